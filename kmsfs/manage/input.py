"""Reading what a command was given: whole, bounded, and with errors that name the file."""

import os
import stat
import sys
from pathlib import Path
from typing import Final

from kmsfs.errors import InputUnreadable, UsageInvalid

STANDARD_INPUT: Final = "-"

_READ_BYTES: Final = 1 << 20


def read_input(name: str, *, max_bytes: int) -> bytes:
    """All of a file, or of standard input for `-`.

    Raises:
        InputUnreadable: missing, a directory, larger than `max_bytes`, or the disk says no.
    """
    try:
        if name == STANDARD_INPUT:
            return _read_all(sys.stdin.fileno(), max_bytes, "standard input")
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise InputUnreadable("it is a directory", hint="name files")
            return _read_all(fd, max_bytes, "it")
        finally:
            os.close(fd)
    except OSError as error:
        raise InputUnreadable(error.strerror or type(error).__name__) from error


def absolute(name: str) -> Path:
    """The path of a file named on the command line; the working directory is still there."""
    return Path(os.path.abspath(name))


def check_utf8(text: str, what: str, *, hint: str | None = None) -> None:
    """Refuse a text from the command line that neither KMS nor a configuration can take.

    Raises:
        UsageInvalid: not UTF-8; `what` names it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageInvalid(f"the {what} {os.fsencode(text)!r} is not UTF-8", hint=hint) from None


def _read_all(fd: int, max_bytes: int, what: str) -> bytes:
    parts: list[bytes] = []
    total = 0
    while part := os.read(fd, _READ_BYTES):
        parts.append(part)
        total += len(part)
        if total > max_bytes:
            raise InputUnreadable(f"{what} is larger than {max_bytes} bytes")
    return b"".join(parts)
