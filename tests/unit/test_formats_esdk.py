"""Messages given a data key: written for the SDK, verified to the last byte."""

import os
from collections.abc import Mapping
from typing import Any

import aws_encryption_sdk
import pytest

from kmsfs.errors import CiphertextInvalid, KeyAccessDenied, PlaintextTooLarge
from kmsfs.formats import esdk
from kmsfs.formats.esdk_header import parse_header
from kmsfs.keys.service import DataKey
from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.local_keys import key_arn

A_KEY = WrittenKey(b"aws-kms", key_arn(1).encode(), b"wrapped")
PLAINTEXT = os.urandom(300)


class OneKey:
    """Gives one data key, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.plaintext = os.urandom(32)
        self.asked: list[tuple[int, dict[str, str]]] = []

    def wrap(self, size_bytes: int, context: Mapping[str, str]) -> DataKey:
        self.asked.append((size_bytes, dict(context)))
        return DataKey(self.plaintext, b"wrapped", key_arn(1))


def writer(**options: Any) -> EsdkWriter:
    return EsdkWriter(os.urandom(32), [A_KEY], **options)


def decrypt(message: bytes, data_key: bytes, size_bytes: int, header_of: bytes = b"") -> bytes:
    out = bytearray(size_bytes)
    header = parse_header(header_of or message)
    esdk.decrypt_message(message, header, data_key, memoryview(out))
    return bytes(out)


def test_written_message_is_signed_and_committing_under_the_callers_context() -> None:
    key = OneKey()
    message = esdk.encrypt_message(PLAINTEXT, wrap=key.wrap, encryption_context={"a": "ü"})
    header = parse_header(message)
    assert header.suite.name == "AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384"
    assert header.key_arns == (key_arn(1),)
    ((size_bytes, context),) = key.asked
    assert size_bytes == 32
    assert context == header.encryption_context
    assert context.keys() == {"a", "aws-crypto-public-key"}
    assert decrypt(message, key.plaintext, len(PLAINTEXT)) == PLAINTEXT


def test_every_message_has_a_key_of_its_own() -> None:
    key = OneKey()
    messages = {esdk.encrypt_message(b"", wrap=key.wrap, encryption_context={}) for _ in range(3)}
    assert len(messages) == len(key.asked) == 3


def test_failure_of_the_wrapping_key_comes_through_as_itself() -> None:
    def refuse(size_bytes: int, context: Mapping[str, str]) -> DataKey:
        raise KeyAccessDenied("no")

    with pytest.raises(KeyAccessDenied):
        esdk.encrypt_message(PLAINTEXT, wrap=refuse, encryption_context={})


def test_plaintext_beyond_the_limit_is_refused_before_a_key_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = OneKey()
    monkeypatch.setattr(esdk, "MAX_PLAINTEXT_BYTES", 10)
    with pytest.raises(PlaintextTooLarge):
        esdk.encrypt_message(bytes(11), wrap=key.wrap, encryption_context={})
    assert key.asked == []


@pytest.mark.parametrize("frame_length", [0, 128])
@pytest.mark.parametrize("signed", [True, False])
def test_trailing_bytes_are_refused_whatever_the_announced_size(
    frame_length: int, signed: bool
) -> None:
    made = writer(frame_length=frame_length, signed=signed)
    message = made.message(PLAINTEXT)
    assert decrypt(message, made.data_key, len(PLAINTEXT)) == PLAINTEXT
    with pytest.raises(CiphertextInvalid, match="bytes follow"):
        decrypt(message + b"\0", made.data_key, len(PLAINTEXT))


@pytest.mark.parametrize("frame_length", [0, 128])
@pytest.mark.parametrize(("off", "text"), [(-1, "more"), (1, "less")])
def test_plaintext_of_another_length_than_announced_is_refused(
    frame_length: int, off: int, text: str
) -> None:
    made = writer(frame_length=frame_length)
    message = made.message(PLAINTEXT)
    with pytest.raises(CiphertextInvalid, match=text):
        decrypt(message, made.data_key, len(PLAINTEXT) + off)


def test_missing_signature_is_refused() -> None:
    made = writer(signed=True)
    made.header()
    made.final_frame(1, b"x")
    with pytest.raises(CiphertextInvalid):
        decrypt(made.written, made.data_key, 1)


def test_other_data_key_is_refused() -> None:
    with pytest.raises(CiphertextInvalid):
        decrypt(writer().message(PLAINTEXT), os.urandom(32), len(PLAINTEXT))


@pytest.mark.parametrize("change", ["context", "keys", "suite"])
def test_header_other_than_the_one_that_was_checked_is_refused(change: str) -> None:
    made = writer(context={"kmsfs:path": "a"})
    other = writer(context={"kmsfs:path": "a"})
    if change == "context":
        other.context = {"kmsfs:path": "b"}
    elif change == "keys":
        other.keys = [WrittenKey(b"aws-kms", key_arn(2).encode(), b"wrapped")]
    else:
        other.signed, other.suite = True, 0x0578
        other.public_key_pair = dict  # type: ignore[method-assign]
    message = made.message(PLAINTEXT)
    with pytest.raises(CiphertextInvalid, match="more than one way"):
        decrypt(message, made.data_key, len(PLAINTEXT), header_of=other.message(b""))


def test_failed_decryption_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made = writer(signed=True)
    message = bytearray(made.message(PLAINTEXT))
    message[-1] ^= 1
    with caplog.at_level("INFO"), pytest.raises(CiphertextInvalid):
        decrypt(bytes(message), made.data_key, len(PLAINTEXT))
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_sdk_reads_what_is_written_here() -> None:
    key = OneKey()
    message = esdk.encrypt_message(PLAINTEXT, wrap=key.wrap, encryption_context={"a": "b"})
    provider = esdk._Unwrapped(header=parse_header(message), data_key=key.plaintext)
    plaintext, header = aws_encryption_sdk.EncryptionSDKClient().decrypt(
        source=message, key_provider=provider
    )
    assert plaintext == PLAINTEXT
    assert header.encryption_context["a"] == "b"
