"""Which format a file is of, from its first bytes; and under which name it is served."""

import binascii
import enum
from typing import Final

# Enough for the oldest bare blobs, whose last telling byte is the 35th, in base64 and after a
# line or two of white space.
DETECT_PREFIX_BYTES: Final = 128

SUFFIXES: Final = (".encrypted", ".kms")
"""Name endings that say "ciphertext" and are taken off for serving."""

WHITE_SPACE: Final = b" \t\r\n\v\f"
"""What may stand anywhere in the base64 form of a blob."""

_BASE64_ALPHABET: Final = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
)

# Observed at the start of every symmetric KMS ciphertext since 2015; not documented by AWS.
_BLOB_MAGIC: Final = (
    b"\x01\x02\x02\x00\x78",
    b"\x01\x02\x03\x00\x78",
    b"\x01\x01\x02\x00\x78",
    b"\x01\x01\x03\x00\x78",
)

# Blobs of 2014 are protocol buffers: field 1, 32 bytes, field 2.
_OLD_BLOB_START: Final = b"\x0a\x20"
_OLD_BLOB_SECOND_FIELD_AT: Final = 34
_OLD_BLOB_SECOND_FIELD: Final = 0x12

# AWS Encryption SDK Developer Guide, "message format": version 1 and type 128; version 2 and a
# suite with key commitment.
_ESDK_MAGIC: Final = (b"\x01\x80", b"\x02\x04\x78", b"\x02\x05\x78")


class Format(enum.StrEnum):
    """What a file's first bytes say it is. They promise nothing about the rest."""

    KMS_BLOB = "kms-blob"
    KMS_BLOB_BASE64 = "kms-blob-base64"
    ESDK = "encryption-sdk"
    UNKNOWN = "unknown"


def detect(prefix: bytes) -> Format:
    """The format of a file that begins with `prefix`.

    Args:
        prefix: the first DETECT_PREFIX_BYTES of the file, or all of a shorter one; more does
            no harm and is not looked at.
    """
    start = bytes(prefix[:DETECT_PREFIX_BYTES])
    if start.startswith(_ESDK_MAGIC):
        return Format.ESDK
    if _is_blob(start):
        return Format.KMS_BLOB
    if _is_blob(_decoded_start(start)):
        return Format.KMS_BLOB_BASE64
    return Format.UNKNOWN


def served_name(file_name: str) -> tuple[str, bool]:
    """The name a source file is served under, and whether a suffix was taken off.

    Only the last suffix is taken off, once; a name that is nothing but a suffix keeps it.
    """
    for suffix in SUFFIXES:
        if file_name.endswith(suffix) and len(file_name) > len(suffix):
            return file_name.removesuffix(suffix), True
    return file_name, False


def _is_blob(start: bytes) -> bool:
    return start.startswith(_BLOB_MAGIC) or (
        start.startswith(_OLD_BLOB_START)
        and start[_OLD_BLOB_SECOND_FIELD_AT : _OLD_BLOB_SECOND_FIELD_AT + 1]
        == bytes((_OLD_BLOB_SECOND_FIELD,))
    )


def _decoded_start(start: bytes) -> bytes:
    """What `start` decodes to as base64, as far as whole groups of four characters go."""
    text = start.translate(None, WHITE_SPACE)
    length = next((i for i, byte in enumerate(text) if byte not in _BASE64_ALPHABET), len(text))
    return binascii.a2b_base64(text[: length - length % 4])
