"""`kmsfs edit`: a file is decrypted into a private ramfs, changed there, and encrypted again."""

import os
import shlex
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from kmsfs.decryptor.decrypt import DecryptedInfo
from kmsfs.errors import InputUnreadable, KmsfsError, UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, served_name
from kmsfs.formats.esdk_header import parse_header
from kmsfs.manage.decrypt import MAX_CIPHERTEXT_BYTES, decrypt_file
from kmsfs.manage.encrypt import encrypt_raw
from kmsfs.manage.input import absolute
from kmsfs.manage.keys import KeyOptions, key_service, settings_for
from kmsfs.manage.original import Original, read_original
from kmsfs.manage.output import check_output, write_file
from kmsfs.manage.place import place_of, volume_above
from kmsfs.manage.private_ram import private_ramfs, run_confined
from kmsfs.manage.reencrypt import reseal

_DEFAULT_EDITOR: Final = "vi"

AskAgain = Callable[[KmsfsError], bool]
"""Told why what was edited cannot be saved; whether to edit it once more, or lose it."""


def editor_of(environment: Mapping[str, str]) -> list[str]:
    """The program that the user wants to edit with, with its arguments."""
    words = shlex.split(environment.get("VISUAL") or environment.get("EDITOR") or "")
    return words or [_DEFAULT_EDITOR]


def edit_file(
    name: str,
    options: KeyOptions,
    *,
    editor: list[str],
    environment: Mapping[str, str],
    ask_again: AskAgain,
) -> bool:
    """Have a ciphertext file edited in place.

    It stays under the key and the encryption context that it was under, and its version rises. It
    is replaced whole, or stays as it was.

    Returns: whether anything was changed.
    Raises:
        UsageInvalid: no such editor, or it failed; the file changed meanwhile.
        GuaranteeNotMet: no private ramfs.
        KmsfsError: as `decrypt_file` and `KeyService` raise.
    Plaintext: in the ramfs, and in this process, whose memory is locked.
    """
    original = read_original(absolute(name), max_bytes=MAX_CIPHERTEXT_BYTES)
    check_output(original.path, replace=True)
    with private_ramfs() as directory, decrypt_file(name, None, options) as plaintext:
        edited = directory / served_name(original.path.name)[0]
        write_file(edited, plaintext.content, replace=False)
        while True:
            status = run_confined([*editor, str(edited)], directory, environment)
            if status:
                how = f"signal {-status}" if status < 0 else f"status {status}"
                raise UsageInvalid(f"{editor[0]} ended with {how}", hint="nothing was changed")
            changed = _read_edited(edited)
            if changed == plaintext.content:
                return False
            try:
                _save(original, plaintext.info, changed, options)
            except KmsfsError as error:
                if not ask_again(error):
                    raise
            else:
                return True


def _read_edited(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputUnreadable(f"the edited file is gone: {error.strerror}") from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputUnreadable("what was edited is no file any more")
        return file.read(esdk.MAX_PLAINTEXT_BYTES + 1)


def _save(original: Original, info: DecryptedInfo, plaintext: bytes, options: KeyOptions) -> None:
    """Encrypt as the original was, and put it in its place."""
    volume = volume_above(original.path.parent)
    settings = settings_for(volume, options)
    keys = key_service(settings)
    if info.format == Format.ESDK.value:
        header = parse_header(original.content)
        here = place_of(original.path, volume)
        place = here if is_bound(header.encryption_context) else None
        made = reseal(original, header, plaintext, place, key_id=info.key_arn, keys=keys)
    else:
        pairs = settings.encryption_context
        made = encrypt_raw(plaintext, key_id=info.key_arn, encryption_context=pairs, keys=keys)
    write_file(original.path, made.ciphertext, replace=True, like=original)
