"""The files below a directory that a command works on, found before any is touched."""

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kmsfs.errors import InputUnreadable
from kmsfs.formats.detect import DETECT_PREFIX_BYTES, Format, detect, served_name
from kmsfs.formats.kms_blob import MAX_CIPHERTEXT_BYTES
from kmsfs.manage.output import is_temporary_name

# A replacement has that name for less than a moment; one this old has nobody who will use it.
_LEFT_BEHIND_S: Final = 60.0


@dataclass(slots=True)
class Tree:
    """What lies below a directory.

    Attributes:
        files: paths of regular files, relative to it, sorted by directory and name.
        directories: paths of directories, relative to it, each before those below it.
        passed_over: path and kind of what is neither file nor directory: not followed.
    """

    files: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)


def find_files(directory: Path, *, without: Path | None = None) -> Tree:
    """Everything below a directory; symbolic links are not followed.

    What a killed command left of a file that it was about to replace is removed; it holds
    ciphertext, or plaintext where the command was to write that.

    Args:
        without: a directory that is left out, with all below it.

    Raises:
        InputUnreadable: a directory is missing or cannot be read.
    """
    tree = Tree()
    left_out = None if without is None else os.path.realpath(without)
    for parent, entries in _walk(directory):
        for entry in list(entries):
            path = os.path.relpath(entry.path, directory)
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                if os.path.realpath(entry.path) == left_out:
                    entries.remove(entry)
                else:
                    tree.directories.append(path)
            elif not stat.S_ISREG(mode):
                tree.passed_over.append((path, _kind(mode)))
            elif is_temporary_name(entry.name):
                _remove_old(os.path.join(parent, entry.name))
            else:
                tree.files.append(path)
    return tree


def is_ciphertext(path: str | Path) -> bool:
    """Whether a file begins like ciphertext, or is named like it and as small as a bare blob.

    Raises:
        InputUnreadable: missing, no regular file, or the disk says no.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InputUnreadable("it is not a regular file", hint="name files")
            if detect(os.pread(fd, DETECT_PREFIX_BYTES, 0)) is not Format.UNKNOWN:
                return True
        finally:
            os.close(fd)
    except OSError as error:
        raise InputUnreadable(error.strerror or type(error).__name__) from error
    return served_name(os.path.basename(path))[1] and 0 < info.st_size <= MAX_CIPHERTEXT_BYTES


def _walk(directory: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each directory with its entries, of which those left in the list are walked after it."""
    waiting = [os.fspath(directory)]
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(parent) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise InputUnreadable(f"{parent}: {error.strerror}") from error
        yield parent, entries
        waiting += [e.path for e in reversed(entries) if e.is_dir(follow_symlinks=False)]


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _remove_old(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_mtime < time.time() - _LEFT_BEHIND_S:
            os.unlink(path)
