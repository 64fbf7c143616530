"""`kmsfs edit`: a file is decrypted into a private ramfs, changed there, and encrypted again."""

import os
import shlex
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kmsfs.decryptor.decrypt import DecryptedInfo
from kmsfs.errors import InputUnreadable, KmsfsError, OutputUnwritable, UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, served_name
from kmsfs.formats.esdk_header import parse_header
from kmsfs.keys.service import KeyService
from kmsfs.manage.decrypt import MAX_CIPHERTEXT_BYTES, decrypt_file
from kmsfs.manage.encrypt import Encrypted, encrypt_bound, encrypt_raw, next_version, users_pairs
from kmsfs.manage.input import absolute, read_input
from kmsfs.manage.keys import KeyOptions, key_service, settings_for
from kmsfs.manage.output import check_output, write_file
from kmsfs.manage.place import place_of, volume_above
from kmsfs.manage.private_ram import private_ramfs, run_confined

_DEFAULT_EDITOR: Final = "vi"

AskAgain = Callable[[KmsfsError], bool]
"""Told why what was edited cannot be saved; whether to edit it once more, or lose it."""


@dataclass(frozen=True, slots=True)
class _Original:
    """What is edited: its ciphertext, and how that was made."""

    path: Path
    ciphertext: bytes
    info: DecryptedInfo
    permissions: os.stat_result


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
    path = absolute(name)
    if path.is_symlink():
        raise UsageInvalid("it is a symbolic link", hint=f"name the file: {os.path.realpath(path)}")
    check_output(path, replace=True)
    # First: what is decrypted then is this, or the change is noticed when it is saved.
    ciphertext = read_input(name, max_bytes=MAX_CIPHERTEXT_BYTES)
    with private_ramfs() as directory, decrypt_file(name, None, options) as plaintext:
        original = _Original(path, ciphertext, plaintext.info, os.stat(path))
        edited = directory / served_name(path.name)[0]
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
                _save(original, changed, options)
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


def _save(original: _Original, plaintext: bytes, options: KeyOptions) -> None:
    path = original.path
    settings = settings_for(volume_above(path.parent), options)
    encrypted = _encrypt_alike(
        original, plaintext, settings.encryption_context, key_service(settings)
    )
    if read_input(str(path), max_bytes=MAX_CIPHERTEXT_BYTES) != original.ciphertext:
        raise OutputUnwritable(f"{path} was changed by somebody else meanwhile")
    mode = stat.S_IMODE(original.permissions.st_mode)
    write_file(path, encrypted.ciphertext, replace=True, mode=mode)
    os.chown(path, original.permissions.st_uid, original.permissions.st_gid)


def _encrypt_alike(
    original: _Original, plaintext: bytes, pairs: Mapping[str, str], keys: KeyService
) -> Encrypted:
    """Encrypt as the original was: format, key, encryption context, place."""
    key_id = original.info.key_arn
    if original.info.format != Format.ESDK.value:
        return encrypt_raw(plaintext, key_id=key_id, encryption_context=pairs, keys=keys)
    context = parse_header(original.ciphertext).encryption_context
    place = (
        place_of(original.path, volume_above(original.path.parent)) if is_bound(context) else None
    )
    return encrypt_bound(
        plaintext,
        place,
        next_version(original.path),
        key_id=key_id,
        encryption_context=users_pairs(context),
        keys=keys,
    )
