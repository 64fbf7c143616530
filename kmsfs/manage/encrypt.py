"""Encrypting: plaintext into a message bound to where it will lie, or into a bare blob."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kmsfs.errors import CiphertextInvalid, PlaintextTooLarge, UsageInvalid
from kmsfs.formats import esdk, kms_blob
from kmsfs.formats.binding import PATH_KEY, VERSION_KEY, VOLUME_KEY, Place, bound_context
from kmsfs.formats.detect import Format, detect
from kmsfs.formats.esdk_header import MAX_HEADER_BYTES, HeaderIncomplete, parse_header
from kmsfs.keys.service import DataKey, KeyService
from kmsfs.manage.place import VolumeHere

_OWN_CONTEXT_KEYS = (VOLUME_KEY, PATH_KEY, VERSION_KEY)


@dataclass(frozen=True, slots=True)
class Encrypted:
    """A ciphertext, and the ARN of the key it is encrypted under."""

    ciphertext: bytes
    key_arn: str


def encrypt_bound(
    plaintext: bytes,
    place: Place | None,
    version: int,
    *,
    key_id: str,
    encryption_context: Mapping[str, str],
    keys: KeyService,
) -> Encrypted:
    """Encrypt into an Encryption SDK message.

    Args:
        place: what the message is bound to; None binds it to nothing.
        version: of the file at that place, rising.
        encryption_context: pairs beside kmsfs's own.

    Raises:
        UsageInvalid: a pair takes a name that is not the user's to take.
        PlaintextTooLarge: beyond what a message takes.
        KmsfsError: as `KeyService.generate_data_key`.
    """
    _check_context_keys(encryption_context)
    context = dict(encryption_context)
    if place is not None:
        context = bound_context(place, version, context)
    key_arn = ""

    def wrap(size_bytes: int, full_context: Mapping[str, str]) -> DataKey:
        nonlocal key_arn
        key = keys.generate_data_key(
            key_id=key_id, size_bytes=size_bytes, encryption_context=full_context
        )
        key_arn = key.key_arn
        return key

    message = esdk.encrypt_message(plaintext, wrap=wrap, encryption_context=context)
    return Encrypted(message, key_arn)


def encrypt_raw(
    plaintext: bytes, *, key_id: str, encryption_context: Mapping[str, str], keys: KeyService
) -> Encrypted:
    """Encrypt into a bare KMS ciphertext blob, as `aws kms encrypt` does.

    Raises:
        PlaintextTooLarge: more than KMS takes.
        UsageInvalid: nothing to encrypt, or a pair takes a name of kmsfs.
        KmsfsError: as `KeyService.encrypt`.
    """
    _check_context_keys(encryption_context)
    if not plaintext:
        raise UsageInvalid("KMS encrypts no empty plaintext", hint="leave --raw out")
    if len(plaintext) > kms_blob.MAX_PLAINTEXT_BYTES:
        raise PlaintextTooLarge(
            f"{len(plaintext)} bytes; a bare KMS blob takes {kms_blob.MAX_PLAINTEXT_BYTES} at most",
            hint="leave --raw out",
        )
    encryption = keys.encrypt(plaintext, key_id=key_id, encryption_context=encryption_context)
    return Encrypted(encryption.ciphertext, encryption.key_arn)


def users_pairs(context: Mapping[str, str]) -> dict[str, str]:
    """The pairs of an encryption context that are neither kmsfs's nor the Encryption SDK's."""
    return {
        key: value
        for key, value in context.items()
        if key not in _OWN_CONTEXT_KEYS and not key.startswith(esdk.RESERVED_CONTEXT_PREFIX)
    }


def next_version(output: Path) -> int:
    """A version higher than every one before: seconds since 1970, or one more than that of the
    message at `output`, if that is higher.

    Without the time a file that was removed, or made elsewhere, would begin anew, and a mount
    that has seen its last version would take it for an older one.
    """
    now = int(time.time())
    try:
        with output.open("rb") as file:
            header = parse_header(file.read(MAX_HEADER_BYTES))
        return max(now, int(header.encryption_context[VERSION_KEY]) + 1)
    except (OSError, KeyError, ValueError, HeaderIncomplete, CiphertextInvalid):
        return now


def check_is_plaintext(data: bytes) -> None:
    """Refuse to encrypt what is ciphertext already.

    Raises:
        UsageInvalid: it begins like ciphertext.
    """
    if detect(data) is not Format.UNKNOWN:
        raise UsageInvalid("it is ciphertext already", hint="add --force to encrypt it once more")


def warnings_of(
    volume: VolumeHere | None, path: str, encrypted: Encrypted, *, bound: bool
) -> list[tuple[str, str]]:
    """What should be thought about in a file that lies at `path` of a volume, with hints."""
    if volume is None:
        return []
    found: list[tuple[str, str]] = []
    if not bound and not volume.may_be_unbound(path):
        found.append(
            (
                f"it is bound to no place, so volume {volume.name!r} does not serve it",
                "name it under unbound in kmsfs.toml",
            )
        )
    allowed = volume.file.kms.key_ids
    if all(":key/" in key_id for key_id in allowed) and encrypted.key_arn not in allowed:
        found.append(
            (
                f"volume {volume.name!r} does not allow its key {encrypted.key_arn}",
                "add that ARN to key_ids in kmsfs.toml",
            )
        )
    return found


def _check_context_keys(context: Mapping[str, str]) -> None:
    for key in context:
        if key in _OWN_CONTEXT_KEYS or key.startswith(esdk.RESERVED_CONTEXT_PREFIX):
            raise UsageInvalid(f"the encryption context key {key!r} is not free to be set")
