"""Bare blobs: strict base64, and the plaintext's length from the blob's structure."""

import base64

import pytest

from kmsfs.errors import CiphertextInvalid
from kmsfs.formats.kms_blob import (
    MAX_BASE64_BYTES,
    MAX_CIPHERTEXT_BYTES,
    decode_base64,
    estimate_plaintext_size,
    guess_blob,
)
from tests.support.local_keys import LocalKeys, key_arn

# What GenerateDataKey of real KMS gave for a 32-byte key, as far as it is structure: all but the
# key's fingerprint, IV and encrypted content, which are replaced by zeros.
REAL_SHAPE = (
    bytes.fromhex("0102020078")
    + bytes(32)
    + b"\x01"
    + bytes(16)
    + bytes.fromhex(
        "0000007e"
        "307c06092a864886f70d010706a06f306d020100306806092a864886f70d010701"
        "301e060960864801650304012e3011040c"
    )
    + bytes(12)
    + bytes.fromhex("020110803b")
    + bytes(59)
)


def _blob(size_bytes: int) -> bytes:
    return (
        LocalKeys().encrypt(bytes(size_bytes), key_id=key_arn(1), encryption_context={}).ciphertext
    )


def test_real_shape_of_a_data_key_gives_32_bytes() -> None:
    assert len(REAL_SHAPE) == 184
    assert estimate_plaintext_size(REAL_SHAPE) == 32


@pytest.mark.parametrize("size_bytes", [1, 10, 32, 100, 101, 127, 228, 229, 1000, 4096])
def test_size_is_estimated_over_every_form_of_der_length(size_bytes: int) -> None:
    assert estimate_plaintext_size(_blob(size_bytes)) == size_bytes


def test_older_kind_without_the_second_field_is_estimated_too() -> None:
    older = bytes.fromhex("0101030078") + bytes(32) + REAL_SHAPE[54:]
    assert estimate_plaintext_size(older) == 32


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REAL_SHAPE[:-1],
        REAL_SHAPE + b"\0",
        REAL_SHAPE[:54] + bytes(4),
        REAL_SHAPE[:57] + b"\x02\x30\x00",
        b"\x0a\x20" + bytes(32) + b"\x12" + bytes(200),
        bytes(58),
    ],
)
def test_no_size_is_guessed_where_structure_does_not_tell(data: bytes) -> None:
    assert estimate_plaintext_size(data) is None


def test_base64_may_hold_white_space_anywhere() -> None:
    blob = _blob(100)
    text = base64.b64encode(blob)
    spread = b"\r\n".join(text[i : i + 7] for i in range(0, len(text), 7))
    assert decode_base64(b" \t" + spread + b"\v\f\n") == blob


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"AQICAHg",
        b"AQIC====",
        b"AQ=CAHg=",
        b"AQICAHg=AQIC",
        b"AQICAHh=",  # bits beyond the last byte
        b"AQICAH-_",
        b"AQICAHg=!",
        "AQICAHgä".encode(),
    ],
)
def test_base64_must_be_valid_as_a_whole(text: bytes) -> None:
    with pytest.raises(CiphertextInvalid):
        decode_base64(text)


def test_base64_is_bounded() -> None:
    longest = base64.b64encode(bytes(MAX_CIPHERTEXT_BYTES))
    assert len(decode_base64(longest.ljust(MAX_BASE64_BYTES))) == MAX_CIPHERTEXT_BYTES
    with pytest.raises(CiphertextInvalid):
        decode_base64(longest.ljust(MAX_BASE64_BYTES + 1))


def test_unknown_bytes_stand_for_what_they_decode_to_or_for_themselves() -> None:
    assert guess_blob(base64.encodebytes(b"\x00\xff blob")) == b"\x00\xff blob"
    assert guess_blob(b"\x00\xff blob") == b"\x00\xff blob"
    assert guess_blob(b"12345678-1234-1234-1234-123456789012") == (
        b"12345678-1234-1234-1234-123456789012"
    )
