"""Bare KMS ciphertext blobs, as `aws kms encrypt` gives them, in binary or in base64.

A blob says nothing of its key or encryption context that could be read without KMS.
"""

import binascii
from typing import Final

from kmsfs.errors import CiphertextInvalid
from kmsfs.formats.detect import WHITE_SPACE

# KMS API Reference: CiphertextBlob of Decrypt, Plaintext of Encrypt.
MAX_CIPHERTEXT_BYTES: Final = 6144
MAX_PLAINTEXT_BYTES: Final = 4096

# Base64 of the longest blob is 8192 characters; as much again for line ends and indentation.
MAX_BASE64_BYTES: Final = 16384

# A blob of today: 5 bytes of magic, 32 bytes that stand for the key, in the newer kind 17 bytes
# more, then the length of what follows as 4 bytes, then a CMS EncryptedData in DER.
_DER_STARTS: Final = (41, 58)
_LENGTH_BYTES: Final = 4
_SEQUENCE: Final = 0x30
_CONTEXT_0: Final = 0xA0
_CONTEXT_0_OCTETS: Final = 0x80

# From the CMS ContentInfo down to its encrypted content: at each level the last element.
_DER_PATH: Final = (_SEQUENCE, _CONTEXT_0, _SEQUENCE, _SEQUENCE, _CONTEXT_0_OCTETS)

# Encrypted content less plaintext, in every sample known (10 and 32 bytes of plaintext).
_CONTENT_OVERHEAD_BYTES: Final = 27


def decode_base64(data: bytes) -> bytes:
    """The blob that `data` holds in base64, with white space anywhere.

    Raises:
        CiphertextInvalid: not base64 as a whole, without its padding, or too long for a blob.
    """
    if len(data) > MAX_BASE64_BYTES:
        raise CiphertextInvalid(f"{len(data)} bytes are too many for a KMS blob in base64")
    text = bytes(data).translate(None, WHITE_SPACE)
    try:
        blob = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise CiphertextInvalid("begins as base64 of a KMS blob, but is not base64") from None
    # What decodes and encodes again to something else carries bits that nobody verifies.
    if not blob or binascii.b2a_base64(blob, newline=False) != text:
        raise CiphertextInvalid("begins as base64 of a KMS blob, but is not base64")
    return blob


def guess_blob(data: bytes) -> bytes:
    """What to try as a blob when the format of `data` is unknown.

    Bytes that are as a whole valid base64 stand for what they decode to, others for themselves.
    """
    try:
        return decode_base64(data)
    except CiphertextInvalid:
        return data


def estimate_plaintext_size(data: bytes) -> int | None:
    """The likely length in bytes of a current blob's plaintext; None where nothing tells.

    Args:
        data: the whole blob, in binary.
    """
    for start in _DER_STARTS:
        length = int.from_bytes(data[start - _LENGTH_BYTES : start])
        if length == len(data) - start and length > 0:
            content_bytes = _content_length(data, start)
            if content_bytes is None or content_bytes < _CONTENT_OVERHEAD_BYTES:
                return None
            size_bytes = content_bytes - _CONTENT_OVERHEAD_BYTES
            return size_bytes if size_bytes <= MAX_PLAINTEXT_BYTES else None
    return None


def _content_length(data: bytes, start: int) -> int | None:
    """Length of the encrypted content in the DER that fills `data` from `start` to its end."""
    at = start
    length = 0
    for depth, tag in enumerate(_DER_PATH):
        element = _last_element(data, at) if depth else _element(data, at)
        if element is None:
            return None
        found_tag, at, length = element
        if found_tag != tag or at + length != len(data):
            return None
    return length


def _last_element(data: bytes, at: int) -> tuple[int, int, int] | None:
    """The element that ends where `data` ends, among those that follow each other from `at`."""
    while (element := _element(data, at)) is not None:
        _, content_at, length = element
        if content_at + length == len(data):
            return element
        at = content_at + length
    return None


def _element(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Tag, content offset and content length of the DER element at `at`; None if there is none."""
    if at + 2 > len(data):
        return None
    tag, length = data[at], data[at + 1]
    at += 2
    if length & 0x80:
        octets = length & 0x7F
        # Two octets of length go beyond the longest blob.
        if not 1 <= octets <= 2 or at + octets > len(data):
            return None
        length = int.from_bytes(data[at : at + octets])
        at += octets
    if at + length > len(data):
        return None
    return tag, at, length
