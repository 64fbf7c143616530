"""Decrypting one file for the person who asked, under the rules that a mount would apply."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kmsfs.decryptor.decrypt import DecryptedInfo, decrypt_ciphertext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import CiphertextInvalid, UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, detect, served_name
from kmsfs.formats.esdk_header import HeaderIncomplete, parse_header
from kmsfs.keys.service import KeyService
from kmsfs.manage.input import STANDARD_INPUT, absolute, read_input
from kmsfs.manage.keys import KeyOptions, KeyServices, settings_for
from kmsfs.manage.place import Volumes, place_of, volume_above

# An unframed body adds 36 bytes, a frame 32, header and footer are small: with frames of 128
# bytes, the least that the SDK writes, a ciphertext is a quarter longer than its plaintext.
MAX_CIPHERTEXT_BYTES: Final = esdk.MAX_PLAINTEXT_BYTES // 4 * 5 + (1 << 20)


@dataclass(frozen=True, slots=True)
class Plaintext:
    """A decrypted file; `content` is wiped when the context that gave it ends.

    Attributes:
        warning: what should be thought about; empty if nothing.
    """

    content: memoryview = field(repr=False)
    info: DecryptedInfo
    warning: str = ""


@contextlib.contextmanager
def decrypt_file(
    name: str,
    path: str | None,
    options: KeyOptions,
    *,
    services: KeyServices | None = None,
    volumes: Volumes | None = None,
) -> Iterator[Plaintext]:
    """The plaintext of one file, or of standard input for `-`, zeroed when the context ends.

    As in a mount, a file that is bound must lie where it belongs. Unlike there, one that is not
    bound is decrypted, since somebody named it. Copies that AWS libraries leave on the heap end
    with the process.

    Args:
        path: served path of what standard input holds.
        services, volumes: of a command that works on many files.

    Raises:
        UsageInvalid, InputUnreadable, ConfigInvalid, ConfigUntrusted: see their classes.
        KmsfsError: as `decrypt_ciphertext`.
    """
    file = _file_path(name, path)
    volume = (volumes or Volumes()).above(file.parent)
    place = place_of(file, volume)
    settings = settings_for(volume, options)
    ciphertext = read_input(name, max_bytes=MAX_CIPHERTEXT_BYTES)
    rules = DecryptRules.of(
        settings,
        place,
        binding_required=False,
        unknown_as_blob=served_name(file.name)[1],
        max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
    )
    warning = ""
    if volume is not None and not volume.may_be_unbound(place.path) and _is_unbound(ciphertext):
        warning = f"it is bound to no place, so volume {volume.name!r} does not serve it"
    keys = (services or KeyServices()).get(settings)
    with decrypted(ciphertext, rules, keys) as (content, info):
        yield Plaintext(content, info, warning)


@contextlib.contextmanager
def decrypted(
    ciphertext: bytes, rules: DecryptRules, keys: KeyService
) -> Iterator[tuple[memoryview, DecryptedInfo]]:
    """A ciphertext's plaintext, zeroed when the context ends.

    Raises: as `decrypt_ciphertext`.
    """
    buffer = bytearray()

    def allocate(size_bytes: int) -> memoryview:
        nonlocal buffer
        buffer = bytearray(size_bytes)
        return memoryview(buffer)

    try:
        info = decrypt_ciphertext(ciphertext, rules, keys, allocate)
        with memoryview(buffer) as content:
            yield content, info
    finally:
        buffer[:] = bytes(len(buffer))


def output_path(name: str, path: str | None, output: str) -> Path:
    """Where `-o output` puts the plaintext of a file: there, or under its served name in there.

    Raises:
        UsageInvalid: a directory, for standard input without a name.
    """
    target = absolute(output)
    if not output.endswith("/") and not target.is_dir():
        return target
    file = _file_path(name, path)
    if file.name == STANDARD_INPUT:
        raise UsageInvalid("standard input has no name", hint="give it one with --path")
    return target / served_name(file.name)[0]


def _file_path(name: str, path: str | None) -> Path:
    """The file's path, or what it would be if standard input lay in the working directory."""
    if name != STANDARD_INPUT:
        if path is not None:
            raise UsageInvalid("--path names standard input; a file has its own name")
        return absolute(name)
    if path is None:
        return Path.cwd() / STANDARD_INPUT
    volume = volume_above(Path.cwd())
    return (volume.root if volume is not None else Path.cwd()) / path


def _is_unbound(ciphertext: bytes) -> bool:
    if detect(ciphertext) is not Format.ESDK:
        return True
    try:
        return not is_bound(parse_header(ciphertext).encryption_context)
    except (HeaderIncomplete, CiphertextInvalid):
        return False
