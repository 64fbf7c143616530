"""Encryption SDK headers: what is accepted, what is refused, and sizes by arithmetic."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aws_encryption_sdk.identifiers import AlgorithmSuite

from kmsfs.errors import CiphertextInvalid
from kmsfs.formats.esdk_header import (
    MAX_ENCRYPTED_DATA_KEYS,
    MAX_HEADER_BYTES,
    SUITES,
    EncryptedDataKey,
    HeaderIncomplete,
    parse_header,
    plaintext_size_bytes,
    read_header,
)
from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message

A_KEY = WrittenKey(b"aws-kms", key_arn(1).encode(), b"wrapped")


def reader_of(data: bytes, log: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def read_at(offset: int, size_bytes: int) -> bytes:
        if log is not None:
            log.append((offset, size_bytes))
        return data[offset : offset + size_bytes]

    return read_at


def writer(**options: Any) -> EsdkWriter:
    return EsdkWriter(os.urandom(32), options.pop("keys", [A_KEY]), **options)


def header_bytes(**options: Any) -> bytes:
    made = writer(**options)
    made.header()
    return made.written


def test_suite_table_agrees_with_the_sdk() -> None:
    assert set(SUITES) == {suite.algorithm_id for suite in AlgorithmSuite}
    for theirs in AlgorithmSuite:
        ours = SUITES[theirs.algorithm_id]
        assert ours.committing == theirs.is_committing()
        assert ours.signed == theirs.is_signing()
        assert ours.key_bytes == theirs.kdf_input_len
        assert ours.format_version == theirs.message_format_version
        assert ours.max_signature_bytes >= theirs.signature_len
        assert (theirs.iv_len, theirs.tag_len) == (12, 16)
        assert ours.name == theirs.name


@pytest.mark.parametrize("suite_id", sorted(SUITES))
def test_header_of_every_suite_is_read_as_the_sdk_wrote_it(suite_id: int) -> None:
    keys = LocalKeys()
    context = {"service": "web", "ü": "ß"}
    arns = (key_arn(1), key_arn(2))
    message = sdk_message(keys, b"x", suite_id=suite_id, context=context, key_arns=arns)
    header = parse_header(message)
    assert header.suite.id == suite_id
    assert context.items() <= header.encryption_context.items()
    assert set(header.key_arns) == set(arns)
    assert header.framed
    assert header.frame_length_bytes == 4096


def test_data_keys_keep_their_order() -> None:
    arns = [key_arn(number).encode() for number in range(1, 9)]
    keys = [WrittenKey(b"aws-kms", arn, b"x") for arn in arns]
    assert [arn.encode() for arn in parse_header(header_bytes(keys=keys)).key_arns] == arns


def test_every_prefix_asks_for_more_and_never_for_more_than_there_is() -> None:
    whole = header_bytes(context={"service": "web"}, signed=True)
    for length in range(len(whole)):
        with pytest.raises(HeaderIncomplete) as caught:
            parse_header(whole[:length])
        assert length < caught.value.needed_bytes <= len(whole)
    assert parse_header(whole + b"body").length_bytes == len(whole)


def test_long_header_is_read_in_few_steps() -> None:
    whole = header_bytes(context={"pad": "x" * 40_000})
    log: list[tuple[int, int]] = []
    header = read_header(reader_of(whole, log), len(whole))
    assert header.length_bytes == len(whole)
    assert len(log) <= 3


def test_file_that_ends_within_its_header_is_invalid() -> None:
    whole = header_bytes()
    with pytest.raises(CiphertextInvalid):
        read_header(reader_of(whole[:-1]), len(whole) - 1)


def test_file_that_shrinks_while_it_is_read_is_invalid() -> None:
    whole = header_bytes()
    with pytest.raises(CiphertextInvalid):
        read_header(reader_of(whole[:50]), len(whole))


@pytest.mark.parametrize(
    ("raw", "accepted"),
    [
        (b"", True),
        (b"\0\0", True),
        (b"\0\1\0\1k\0\1v", True),
        (b"\0\1\0\0\0\0", True),
        (b"\0\2\0\1b\0\1v\0\1a\0\1v", True),  # out of order, which the SDK accepts
        (b"\0\2\0\1k\0\1v\0\1k\0\1w", False),
        (b"\0\1\0\1k\0\1v!", False),
        (b"\0\2\0\1k\0\1v", False),
        (b"\0\1\0\1k\0\2v", False),
        (b"\0\1\0\1\xff\0\1v", False),
        (b"\0\1\0\1k\0\1\xff", False),
        (b"\0", False),
    ],
)
def test_context_is_accepted_or_refused_as_by_the_sdk(raw: bytes, accepted: bool) -> None:
    from aws_encryption_sdk.exceptions import SerializationError
    from aws_encryption_sdk.internal.formatting.encryption_context import (
        deserialize_encryption_context,
    )

    data = header_bytes(raw_context=raw)
    if accepted:
        assert parse_header(data).encryption_context == deserialize_encryption_context(raw)
    else:
        with pytest.raises(SerializationError):
            deserialize_encryption_context(raw)
        with pytest.raises(CiphertextInvalid):
            parse_header(data)


@pytest.mark.parametrize("count", [0, MAX_ENCRYPTED_DATA_KEYS + 1, 65535])
def test_number_of_data_keys_is_bounded(count: int) -> None:
    small = WrittenKey(b"", b"", b"")
    with pytest.raises(CiphertextInvalid):
        parse_header(header_bytes(keys=[small] * count))
    assert parse_header(header_bytes(keys=[small] * MAX_ENCRYPTED_DATA_KEYS))


def test_header_is_bounded() -> None:
    huge = WrittenKey(b"aws-kms", b"x" * 65535, b"x" * 65535)
    with pytest.raises(CiphertextInvalid):
        parse_header(header_bytes(keys=[huge, huge])[: MAX_HEADER_BYTES - 1])


@pytest.mark.parametrize(
    ("provider", "info"),
    [
        (b"aws-kms", b"alias/web"),
        (b"aws-kms", b"\xff\xfe"),
        (b"aws-kms", key_arn(1).encode() + b"\n"),
        (b"aws-kms", b"arn:aws:kms:eu-central-1:111122223333:alias/web"),
        (b"raw", key_arn(1).encode()),
    ],
)
def test_only_a_key_arn_of_the_kms_provider_names_a_key(provider: bytes, info: bytes) -> None:
    assert EncryptedDataKey(provider.decode(), info, b"x").key_arn is None


@pytest.mark.parametrize(
    ("content_type", "frame_length"), [(1, 128), (2, 0), (0, 128), (3, 128), (2, 1 << 31)]
)
def test_content_type_must_go_with_frame_length(content_type: int, frame_length: int) -> None:
    made = writer(frame_length=frame_length)
    made.header(content_type=content_type)
    with pytest.raises(CiphertextInvalid):
        parse_header(made.written)


@pytest.mark.parametrize(
    "start",
    ["00", "03", "0181", "01800478", "020014", "02ffff", "01800379"],
)
def test_header_that_no_sdk_writes_is_refused_at_once(start: str) -> None:
    with pytest.raises(CiphertextInvalid):
        parse_header(bytes.fromhex(start))


def test_reserved_bytes_and_iv_length_of_version_1_are_checked() -> None:
    message = sdk_message(LocalKeys(), b"x", suite_id=0x0378)
    end = parse_header(message).length_bytes
    fields_at = end - 28 - 4 - 1 - 4
    assert message[fields_at : fields_at + 5] == b"\0\0\0\0\x0c"
    for offset in range(5):
        changed = bytearray(message)
        changed[fields_at + offset] ^= 1
        with pytest.raises(CiphertextInvalid):
            parse_header(changed)


@pytest.mark.parametrize("suite_id", [0x0014, 0x0214, 0x0378, 0x0478, 0x0578])
@pytest.mark.parametrize("frame_length", [0, 128, 4096])
@pytest.mark.parametrize("size_bytes", [0, 1, 127, 128, 129, 256, 4096, 10_000])
def test_size_is_exact(suite_id: int, frame_length: int, size_bytes: int) -> None:
    message = sdk_message(
        LocalKeys(), bytes(size_bytes), suite_id=suite_id, frame_length=frame_length
    )
    header = parse_header(message)
    assert plaintext_size_bytes(header, len(message), reader_of(message)) == size_bytes


@pytest.mark.parametrize("signed", [True, False])
def test_size_is_exact_where_the_final_frame_is_full(signed: bool) -> None:
    for size_bytes in (16, 32, 320):
        message = writer(frame_length=16, signed=signed).message(
            bytes(size_bytes), full_final_frame=True
        )
        header = parse_header(message)
        assert plaintext_size_bytes(header, len(message), reader_of(message)) == size_bytes


def test_size_takes_few_reads_however_many_frames() -> None:
    message = writer(frame_length=1, signed=True).message(bytes(5000))
    header = parse_header(message)
    log: list[tuple[int, int]] = []
    assert plaintext_size_bytes(header, len(message), reader_of(message, log)) == 5000
    assert len(log) <= 12
    assert sum(size for _, size in log) <= 300


@pytest.mark.parametrize("frame_length", [0, 128])
@pytest.mark.parametrize("signed", [True, False])
def test_no_size_for_a_message_cut_short_or_lengthened(frame_length: int, signed: bool) -> None:
    message = writer(frame_length=frame_length, signed=signed).message(bytes(300))
    header = parse_header(message)
    for length in range(header.length_bytes, len(message)):
        with pytest.raises(CiphertextInvalid):
            plaintext_size_bytes(header, length, reader_of(message[:length]))
    for extra in (b"\0", b"\xff" * 40, message):
        longer = message + extra
        with pytest.raises(CiphertextInvalid):
            plaintext_size_bytes(header, len(longer), reader_of(longer))


def test_unframed_length_that_overflows_is_refused() -> None:
    made = writer(frame_length=0)
    made.header()
    message = made.written + bytes(12) + struct.pack(">Q", (1 << 64) - 1) + bytes(100)
    with pytest.raises(CiphertextInvalid):
        plaintext_size_bytes(parse_header(message), len(message), reader_of(message))


@pytest.mark.parametrize(("sequence", "size_bytes"), [(2, 16), (0, 16), (1, 17), (1, 33)])
def test_final_frame_must_be_the_next_and_no_longer_than_the_others(
    sequence: int, size_bytes: int
) -> None:
    made = writer(frame_length=16)
    made.header()
    made.final_frame(sequence, bytes(size_bytes))
    with pytest.raises(CiphertextInvalid):
        plaintext_size_bytes(parse_header(made.written), len(made.written), reader_of(made.written))


def test_daemons_formats_import_no_aws_library() -> None:
    code = (
        "import sys, kmsfs.formats.detect, kmsfs.formats.kms_blob, kmsfs.formats.esdk_header, "
        "kmsfs.formats.binding, kmsfs.decryptor.rules\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('boto3', 'botocore', 'aws_encryption_sdk', 'cryptography')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
