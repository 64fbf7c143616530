"""Formats are told from first bytes; names lose one suffix."""

import base64

import pytest

from kmsfs.formats.detect import DETECT_PREFIX_BYTES, Format, detect, served_name

OLD_BLOB = b"\x0a\x20" + bytes(range(32)) + b"\x12" + bytes(40)
BLOBS = [
    *(
        bytes.fromhex(magic) + bytes(range(100))
        for magic in (
            "0102020078",
            "0102030078",
            "0101020078",
            "0101030078",
        )
    ),
    OLD_BLOB,
]


@pytest.mark.parametrize("blob", BLOBS)
def test_blob_is_detected_in_binary(blob: bytes) -> None:
    assert detect(blob) is Format.KMS_BLOB


@pytest.mark.parametrize("blob", BLOBS)
@pytest.mark.parametrize("wrap", [base64.b64encode, base64.encodebytes])
@pytest.mark.parametrize("before", [b"", b"\n", b" \r\n\t"])
def test_blob_is_detected_in_base64(blob: bytes, wrap, before: bytes) -> None:
    assert detect(before + wrap(blob)) is Format.KMS_BLOB_BASE64


@pytest.mark.parametrize("blob", BLOBS)
def test_prefix_alone_decides(blob: bytes) -> None:
    text = base64.b64encode(blob)
    assert detect(blob[:DETECT_PREFIX_BYTES]) is detect(blob)
    assert detect(text[:DETECT_PREFIX_BYTES]) is detect(text)


@pytest.mark.parametrize("start", ["0180", "020478", "020578", "0180ffff"])
def test_encryption_sdk_message_is_detected(start: str) -> None:
    assert detect(bytes.fromhex(start) + bytes(20)) is Format.ESDK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x02\x04",
        b"\x01\x02\x02\x00",
        b"\x01\x02\x04\x00\x78",
        b"\x02\x03\x78",
        b"City of London, a text that begins with the same two letters as base64 of 2014",
        b"-----BEGIN PRIVATE KEY-----",
        b"AQIC",
        b"\x0a\x20" + bytes(32) + b"\x13",
        b"\x0a\x20",
        b"\n" * 500,
        b"=AQICAHg",
    ],
)
def test_anything_else_is_unknown(data: bytes) -> None:
    assert detect(data) is Format.UNKNOWN


@pytest.mark.parametrize(
    ("file_name", "served"),
    [
        ("ssl.pem.encrypted", ("ssl.pem", True)),
        ("ssl.pem.kms", ("ssl.pem", True)),
        ("ssl.pem", ("ssl.pem", False)),
        ("a.kms.encrypted", ("a.kms", True)),
        ("a.encrypted.kms", ("a.encrypted", True)),
        (".kms", (".kms", False)),
        (".encrypted", (".encrypted", False)),
        ("a.KMS", ("a.KMS", False)),
        ("encrypted", ("encrypted", False)),
    ],
)
def test_one_suffix_is_taken_off(file_name: str, served: tuple[str, bool]) -> None:
    assert served_name(file_name) == served
