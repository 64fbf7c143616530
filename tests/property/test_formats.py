"""Every parser survives any input; no mutation of a valid ciphertext gives plaintext."""

import base64
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmsfs.decryptor.decrypt import decrypt_ciphertext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import CiphertextInvalid, KmsfsError
from kmsfs.formats import esdk, kms_blob
from kmsfs.formats.binding import Place
from kmsfs.formats.detect import DETECT_PREFIX_BYTES, Format, detect, served_name
from kmsfs.formats.esdk_header import (
    MAX_HEADER_BYTES,
    SUITES,
    EsdkHeader,
    HeaderIncomplete,
    parse_header,
    plaintext_size_bytes,
    read_header,
)
from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message

K1 = key_arn(1)
KEYS = LocalKeys(seed=b"property")
RULES = DecryptRules(
    key_ids=(K1,),
    place=Place("web", "nginx/ssl.pem"),
    unknown_as_blob=True,
    allow_non_committing=True,
)

# Starts that get past detection, so that what follows is parsed.
starts = st.sampled_from(
    [
        b"",
        b"\x01\x80",
        b"\x01\x80\x03\x78",
        b"\x02\x04\x78",
        b"\x02\x05\x78",
        b"\x02\x04\x78" + bytes(32) + b"\0\0\0\1",
        bytes.fromhex("0102020078"),
        b"AQICAHg",
        b"CiA",
    ]
)
anything = st.builds(lambda start, rest: start + rest, starts, st.binary(max_size=2000))

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
contexts = st.dictionaries(
    texts.filter(lambda key: not key.startswith(("aws-crypto-", "kmsfs:"))), texts, max_size=5
)


def read_from(data: bytes) -> Any:
    return lambda offset, size_bytes: data[offset : offset + size_bytes]


class Buffers:
    """Hands out buffers that begin as something else than zeros."""

    def __init__(self) -> None:
        self.all: list[bytearray] = []

    def allocate(self, size_bytes: int) -> memoryview:
        self.all.append(bytearray(b"\xaa" * size_bytes))
        return memoryview(self.all[-1])


def decrypt(data: bytes, rules: DecryptRules = RULES) -> bytes:
    buffers = Buffers()
    decrypt_ciphertext(data, rules, KEYS, buffers.allocate)
    (buffer,) = buffers.all
    return bytes(buffer)


def assert_nothing_released(data: bytes) -> None:
    buffers = Buffers()
    with pytest.raises(KmsfsError):
        decrypt_ciphertext(data, RULES, KEYS, buffers.allocate)
    assert not any(any(buffer) for buffer in buffers.all)


@given(anything)
def test_detection_takes_anything_and_looks_at_the_prefix_only(data: bytes) -> None:
    assert detect(data) is detect(data[:DETECT_PREFIX_BYTES])


@given(st.text(min_size=1))
def test_served_name_is_never_empty_and_never_longer(name: str) -> None:
    served, taken = served_name(name)
    assert served
    assert name.startswith(served)
    assert taken == (served != name)


@given(anything)
def test_blob_parsers_take_anything(data: bytes) -> None:
    size_bytes = kms_blob.estimate_plaintext_size(data)
    assert size_bytes is None or 0 <= size_bytes <= kms_blob.MAX_PLAINTEXT_BYTES
    assert isinstance(kms_blob.guess_blob(data), bytes)


@given(st.binary(min_size=1, max_size=6144), st.integers(1, 100), st.sampled_from(["\n", "\r\n"]))
def test_base64_of_any_blob_comes_back_however_it_is_broken_into_lines(
    blob: bytes, width: int, line_end: str
) -> None:
    text = base64.b64encode(blob)
    width = max(width, len(text) // 3000)
    lines = line_end.encode().join(text[i : i + width] for i in range(0, len(text), width))
    assert kms_blob.decode_base64(lines) == blob


@given(st.integers(1, 4096))
@settings(max_examples=50)
def test_estimate_is_right_for_blobs_of_every_size(size_bytes: int) -> None:
    blob = KEYS.encrypt(bytes(size_bytes), key_id=K1, encryption_context={}).ciphertext
    assert kms_blob.estimate_plaintext_size(blob) == size_bytes


@given(anything)
def test_header_parser_takes_anything(data: bytes) -> None:
    needed_bytes = None
    try:
        assert parse_header(data).length_bytes <= len(data)
    except HeaderIncomplete as incomplete:
        needed_bytes = incomplete.needed_bytes
    except CiphertextInvalid:
        pass
    assert needed_bytes is None or len(data) < needed_bytes <= MAX_HEADER_BYTES
    try:
        found = read_header(read_from(data), len(data))
    except CiphertextInvalid:
        return
    assert found.length_bytes <= len(data)


@given(
    st.sampled_from(sorted(SUITES)),
    st.integers(0, 300),
    st.binary(max_size=500),
    st.integers(0, 1 << 40),
)
def test_size_arithmetic_takes_anything(
    suite_id: int, frame_length: int, body: bytes, claimed_bytes: int
) -> None:
    header = EsdkHeader(SUITES[suite_id], b"", {}, (), frame_length, 100)
    data = bytes(100) + body
    for total_bytes in (len(data), claimed_bytes):
        try:
            size_bytes = plaintext_size_bytes(header, total_bytes, read_from(data))
        except CiphertextInvalid:
            continue
        assert 0 <= size_bytes <= total_bytes


@given(anything)
def test_decryption_takes_anything_and_releases_nothing(data: bytes) -> None:
    assert_nothing_released(data)


@given(
    st.sampled_from(sorted(SUITES)),
    st.one_of(st.integers(0, 3000), st.sampled_from([128, 256, 1024, 2048])),
    st.sampled_from([0, 128, 256, 1024, 4096]),
    contexts,
)
@settings(max_examples=150)
def test_what_the_sdk_writes_is_sized_and_decrypted_exactly(
    suite_id: int, size_bytes: int, frame_length: int, context: dict[str, str]
) -> None:
    plaintext = os.urandom(size_bytes)
    message = sdk_message(
        KEYS, plaintext, suite_id=suite_id, frame_length=frame_length, context=context
    )
    header = read_header(read_from(message), len(message))
    assert context.items() <= header.encryption_context.items()
    assert plaintext_size_bytes(header, len(message), read_from(message)) == size_bytes
    assert decrypt(message) == plaintext


@given(
    st.binary(max_size=600),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
    contexts,
)
@settings(max_examples=150)
def test_what_the_format_allows_is_sized_and_decrypted_exactly(
    plaintext: bytes, frame_length: int, signed: bool, full: bool, context: dict[str, str]
) -> None:
    message = written(plaintext, frame_length, context, signed=signed, full=full)
    header = read_header(read_from(message), len(message))
    assert plaintext_size_bytes(header, len(message), read_from(message)) == len(plaintext)
    assert decrypt(message) == plaintext


@given(st.binary(max_size=300), st.sampled_from([0, 128]), contexts)
@settings(max_examples=50)
def test_what_is_encrypted_here_the_sdk_and_this_package_decrypt(
    plaintext: bytes, frame_length: int, context: dict[str, str]
) -> None:
    message = esdk.encrypt_message(
        plaintext,
        wrap=lambda size, pairs: KEYS.generate_data_key(
            key_id=K1, size_bytes=size, encryption_context=pairs
        ),
        encryption_context=context,
        frame_length_bytes=frame_length,
    )
    header = parse_header(message)
    assert header.suite.committing
    assert header.suite.signed
    assert decrypt(message) == plaintext


def written(
    plaintext: bytes, frame_length: int, context: dict[str, str], *, signed: bool, full: bool
) -> bytes:
    writer = EsdkWriter(os.urandom(32), [], context, frame_length, signed)
    pairs = {**context, **(writer.public_key_pair() if signed else {})}
    wrapped = KEYS.encrypt(writer.data_key, key_id=K1, encryption_context=pairs).ciphertext
    writer.keys = [WrittenKey(b"aws-kms", K1.encode(), wrapped)]
    return writer.message(plaintext, full_final_frame=full)


VALID = {
    "signed": written(os.urandom(300), 128, {"service": "web"}, signed=True, full=False),
    "unsigned": written(os.urandom(300), 128, {}, signed=False, full=False),
    "unframed": written(os.urandom(300), 0, {}, signed=True, full=False),
    "version 1": sdk_message(KEYS, os.urandom(300), suite_id=0x0378, frame_length=128),
    "blob": KEYS.encrypt(os.urandom(100), key_id=K1, encryption_context={}).ciphertext,
}
VALID["base64"] = base64.b64encode(VALID["blob"])
valid = st.sampled_from(sorted(VALID))


@pytest.mark.parametrize("name", sorted(VALID))
def test_unchanged_ciphertext_is_decrypted(name: str) -> None:
    assert len(decrypt(VALID[name])) in {100, 300}


@given(valid, st.data())
@settings(max_examples=300)
def test_one_changed_byte_releases_nothing(name: str, data: st.DataObject) -> None:
    message = bytearray(VALID[name])
    at = data.draw(st.integers(0, len(message) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != message[at]))
    message[at] = byte
    if name == "base64" and kms_blob.guess_blob(bytes(message)) == VALID["blob"]:
        return  # white space in place of nothing that counted
    assert_nothing_released(bytes(message))


@given(valid, st.data())
def test_truncation_releases_nothing(name: str, data: st.DataObject) -> None:
    message = VALID[name]
    assert_nothing_released(message[: data.draw(st.integers(0, len(message) - 1))])


@given(valid, st.binary(min_size=1, max_size=200))
def test_bytes_after_the_end_release_nothing(name: str, extra: bytes) -> None:
    if name == "base64" and not extra.translate(None, b" \t\r\n\v\f"):
        return  # trailing white space belongs to base64
    assert_nothing_released(VALID[name] + extra)


@given(valid, st.data())
def test_cut_out_or_repeated_pieces_release_nothing(name: str, data: st.DataObject) -> None:
    message = VALID[name]
    start = data.draw(st.integers(0, len(message) - 1))
    end = data.draw(st.integers(start + 1, len(message)))
    assert_nothing_released(message[:start] + message[end:])
    assert_nothing_released(message[:end] + message[start:end] + message[end:])


@given(valid)
def test_detected_format_of_valid_ciphertext_is_its_own(name: str) -> None:
    expected = {"blob": Format.KMS_BLOB, "base64": Format.KMS_BLOB_BASE64}.get(name, Format.ESDK)
    assert detect(VALID[name]) is expected
