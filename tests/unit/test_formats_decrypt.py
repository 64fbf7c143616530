"""One ciphertext to plaintext: which key is asked, what is checked before, what is released."""

import base64
import os
from typing import Any

import pytest

from kmsfs.decryptor.decrypt import DecryptedInfo, decrypt_ciphertext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    AlgorithmNotAllowed,
    CiphertextInvalid,
    ContextMismatch,
    CredentialsUnavailable,
    DeadlineExceeded,
    FileTooLarge,
    FormatUnknown,
    IncorrectKey,
    KeyAccessDenied,
    KeyNotAllowed,
    KeyUnusable,
    KmsAnswerInvalid,
    KmsfsError,
    KmsUnreachable,
    LockedMemoryExhausted,
    NotBound,
)
from kmsfs.formats.binding import Place
from kmsfs.formats.detect import Format
from kmsfs.keys.service import Decryption
from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.local_keys import ACCOUNT, REGION, LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message

K1, K2, K3 = key_arn(1), key_arn(2), key_arn(3)
PLAINTEXT = b"correct horse battery staple"


@pytest.fixture
def keys() -> LocalKeys:
    return LocalKeys(3)


class Buffers:
    """Allocates, and remembers what was allocated."""

    def __init__(self) -> None:
        self.all: list[bytearray] = []

    def allocate(self, size_bytes: int) -> memoryview:
        self.all.append(bytearray(b"\xaa" * size_bytes))
        return memoryview(self.all[-1])


def rules(**options: Any) -> DecryptRules:
    return DecryptRules(**{"key_ids": (K1,), "place": Place(None, "file"), **options})


def decrypt(
    data: bytes, keys: LocalKeys, given: DecryptRules | None = None
) -> tuple[bytes, DecryptedInfo]:
    buffers = Buffers()
    info = decrypt_ciphertext(data, given or rules(), keys, buffers.allocate)
    (buffer,) = buffers.all
    return bytes(buffer), info


def refused(
    data: bytes, keys: LocalKeys, error: type[KmsfsError], given: DecryptRules | None = None
) -> KmsfsError:
    """Decryption fails, and no plaintext is left in what was allocated."""
    buffers = Buffers()
    with pytest.raises(KmsfsError) as caught:
        decrypt_ciphertext(data, given or rules(), keys, buffers.allocate)
    assert type(caught.value) is error
    assert len(buffers.all) <= 1
    assert not any(any(buffer) for buffer in buffers.all)
    return caught.value


def sent(keys: LocalKeys) -> list[str | None]:
    return [call.key_id for call in keys.calls if call.operation == "Decrypt"]


def blob(keys: LocalKeys, arn: str = K1, **context: str) -> bytes:
    return keys.encrypt(PLAINTEXT, key_id=arn, encryption_context=context).ciphertext


# --- bare blobs --------------------------------------------------------------------------------


def test_blob_is_decrypted_in_every_form(keys: LocalKeys) -> None:
    data = blob(keys)
    text = base64.encodebytes(data)
    assert decrypt(data, keys) == (PLAINTEXT, DecryptedInfo(len(PLAINTEXT), K1, Format.KMS_BLOB))
    assert decrypt(text, keys)[0] == PLAINTEXT
    assert decrypt(text, keys)[1].format == "kms-blob-base64"


def test_keys_are_tried_in_order_and_only_after_incorrect_key(keys: LocalKeys) -> None:
    data = blob(keys, K2)
    assert decrypt(data, keys, rules(key_ids=(K3, K1, K2)))[1].key_arn == K2
    assert sent(keys) == [K3, K1, K2]


@pytest.mark.parametrize(
    "failure", [KeyAccessDenied("x"), KeyUnusable("x"), KmsUnreachable("x"), CiphertextInvalid("x")]
)
def test_no_next_key_is_tried_after_another_failure(keys: LocalKeys, failure: KmsfsError) -> None:
    data = blob(keys, K2)
    keys.failures[K1] = failure
    refused(data, keys, type(failure), rules(key_ids=(K1, K2)))
    assert sent(keys) == [K1]


def test_blob_of_none_of_the_keys_is_incorrect_key(keys: LocalKeys) -> None:
    error = refused(blob(keys, K3), keys, IncorrectKey, rules(key_ids=(K1, K2)))
    assert K1 in error.detail
    assert K2 in error.detail


def test_any_key_sends_no_key_id(keys: LocalKeys) -> None:
    decrypt(blob(keys, K2), keys, rules(key_ids=(K1,), any_key=True))
    assert sent(keys) == [None]


def test_blob_without_any_allowed_key_never_reaches_kms(keys: LocalKeys) -> None:
    error = refused(blob(keys), keys, KeyNotAllowed, rules(key_ids=()))
    assert "--key-id" in error.hint
    assert sent(keys) == []


def test_configured_context_is_sent_with_blobs(keys: LocalKeys) -> None:
    data = blob(keys, service="web")
    assert decrypt(data, keys, rules(encryption_context={"service": "web"}))[0] == PLAINTEXT
    refused(data, keys, CiphertextInvalid)


def test_blob_is_refused_where_binding_is_required(keys: LocalKeys) -> None:
    data = blob(keys)
    keys.calls.clear()
    refused(data, keys, NotBound, rules(binding_required=True))
    assert keys.calls == []


def test_blob_plaintext_is_bounded(keys: LocalKeys) -> None:
    refused(blob(keys), keys, FileTooLarge, rules(max_plaintext_bytes=len(PLAINTEXT) - 1))
    assert decrypt(blob(keys), keys, rules(max_plaintext_bytes=len(PLAINTEXT)))[0] == PLAINTEXT


def test_blob_beyond_kms_limits_never_reaches_kms(keys: LocalKeys) -> None:
    refused(blob(keys).ljust(6145, b"\0"), keys, CiphertextInvalid)
    assert sent(keys) == []


def test_empty_file_says_where_it_comes_from(keys: LocalKeys) -> None:
    assert "base64 --decode" in refused(b"", keys, CiphertextInvalid).hint


def test_unknown_bytes_are_tried_only_where_the_name_says_ciphertext(keys: LocalKeys) -> None:
    refused(b"some text", keys, FormatUnknown)
    assert sent(keys) == []
    refused(b"some text", keys, CiphertextInvalid, rules(unknown_as_blob=True))
    assert sent(keys) == [K1]


def test_long_unknown_bytes_are_never_tried(keys: LocalKeys) -> None:
    refused(b"?" * 6145, keys, FormatUnknown, rules(unknown_as_blob=True))
    assert sent(keys) == []


class AnythingService(LocalKeys):
    """Takes any bytes for a blob, as the stand-ins of KMS do whose blobs have no magic."""

    def decrypt(self, ciphertext: bytes, **_: Any) -> Decryption:  # type: ignore[override]
        return Decryption(ciphertext[::-1], K1)


def test_unknown_bytes_in_base64_are_decoded_first() -> None:
    given = rules(unknown_as_blob=True)
    data = bytes(range(200, 256))
    assert decrypt(data, AnythingService(), given)[0] == data[::-1]
    assert decrypt(base64.encodebytes(data), AnythingService(), given)[0] == data[::-1]


# --- Encryption SDK messages: keys -------------------------------------------------------------


def test_allowed_arn_is_sent(keys: LocalKeys) -> None:
    data = sdk_message(keys, PLAINTEXT)
    assert decrypt(data, keys)[1] == DecryptedInfo(len(PLAINTEXT), K1, Format.ESDK)
    assert sent(keys) == [K1]


def test_bare_key_id_is_sent_as_given(keys: LocalKeys) -> None:
    key_id = K1.rpartition("/")[2]
    assert decrypt(sdk_message(keys, PLAINTEXT), keys, rules(key_ids=(key_id,)))[0] == PLAINTEXT
    assert sent(keys) == [key_id]


@pytest.mark.parametrize("alias", ["alias/web", f"arn:aws:kms:{REGION}:{ACCOUNT}:alias/web"])
def test_alias_is_sent_as_given_and_kms_decides(keys: LocalKeys, alias: str) -> None:
    data = sdk_message(keys, PLAINTEXT)
    keys.aliases["alias/web"] = K1
    assert decrypt(data, keys, rules(key_ids=(alias,)))[0] == PLAINTEXT
    keys.aliases["alias/web"] = K2
    refused(data, keys, IncorrectKey, rules(key_ids=(alias,)))
    assert sent(keys) == [alias, alias]


@pytest.mark.parametrize(
    "allowed",
    [
        (K2,),
        (K2.rpartition("/")[2],),
        (f"arn:aws:kms:us-east-1:{ACCOUNT}:alias/web",),
        (f"arn:aws:kms:{REGION}:999999999999:alias/web",),
        (K1.upper(),),
        (K1[:-1],),
        (K1 + "0",),
        ("key/" + K1.rpartition("/")[2],),
    ],
)
@pytest.mark.parametrize("any_key", [True, False])
def test_key_named_by_the_file_is_never_called_unless_allowed(
    keys: LocalKeys, allowed: tuple[str, ...], any_key: bool
) -> None:
    data = sdk_message(keys, PLAINTEXT)
    error = refused(data, keys, KeyNotAllowed, rules(key_ids=allowed, any_key=any_key))
    assert K1 in error.detail
    assert sent(keys) == []


def test_message_without_any_allowed_key_never_reaches_kms(keys: LocalKeys) -> None:
    refused(sdk_message(keys, PLAINTEXT), keys, KeyNotAllowed, rules(key_ids=()))
    assert sent(keys) == []


def test_any_key_without_key_ids_takes_the_key_that_the_file_names(keys: LocalKeys) -> None:
    given = rules(key_ids=(), any_key=True)
    assert decrypt(sdk_message(keys, PLAINTEXT), keys, given)[0] == PLAINTEXT
    assert sent(keys) == [K1]


def test_second_data_key_is_tried_where_the_first_is_not_allowed(keys: LocalKeys) -> None:
    data = sdk_message(keys, PLAINTEXT, key_arns=(K1, K2))
    assert decrypt(data, keys, rules(key_ids=(K2,)))[1].key_arn == K2
    assert sent(keys) == [K2]


@pytest.mark.parametrize("failure", [KeyAccessDenied("x"), KmsUnreachable("x"), KeyUnusable("x")])
def test_second_data_key_is_tried_where_the_first_fails(
    keys: LocalKeys, failure: KmsfsError
) -> None:
    data = sdk_message(keys, PLAINTEXT, key_arns=(K1, K2))
    keys.failures[K1] = failure
    assert decrypt(data, keys, rules(key_ids=(K1, K2)))[0] == PLAINTEXT


@pytest.mark.parametrize("failure", [CredentialsUnavailable("x"), DeadlineExceeded("x")])
def test_no_other_data_key_is_tried_where_none_could_do_better(
    keys: LocalKeys, failure: KmsfsError
) -> None:
    data = sdk_message(keys, PLAINTEXT, key_arns=(K1, K2))
    keys.failures = {K1: failure, K2: failure}
    refused(data, keys, type(failure), rules(key_ids=(K1, K2)))
    assert len(sent(keys)) == 1


@pytest.mark.parametrize("order", [(K1, K2), (K2, K1)])
def test_most_telling_failure_is_reported(keys: LocalKeys, order: tuple[str, str]) -> None:
    data = sdk_message(keys, PLAINTEXT, key_arns=order)
    keys.failures = {K1: KmsUnreachable("x"), K2: KeyAccessDenied("x")}
    refused(data, keys, KmsUnreachable, rules(key_ids=(K1, K2)))
    keys.failures = {K1: IncorrectKey("x"), K2: KeyAccessDenied("x")}
    refused(data, keys, KeyAccessDenied, rules(key_ids=(K1, K2)))


def test_message_of_another_provider_never_reaches_kms(keys: LocalKeys) -> None:
    writer = EsdkWriter(os.urandom(32), [WrittenKey(b"raw\n", b"name", b"x")])
    error = refused(writer.message(PLAINTEXT), keys, KeyNotAllowed)
    assert r"'raw\n'" in error.detail
    assert keys.calls == []


def wrapped_for(keys: LocalKeys, named: str, wrapping: str, size_bytes: int = 32) -> bytes:
    """A message that names one key, its data key wrapped under another."""
    writer = EsdkWriter(os.urandom(32), [])
    ciphertext = keys.encrypt(
        writer.data_key[:size_bytes], key_id=wrapping, encryption_context={}
    ).ciphertext
    writer.keys = [WrittenKey(b"aws-kms", named.encode(), ciphertext)]
    return writer.message(PLAINTEXT)


def test_message_that_names_another_key_than_wrapped_it_is_refused(keys: LocalKeys) -> None:
    refused(wrapped_for(keys, K1, K2), keys, IncorrectKey)
    keys.aliases["alias/web"] = K2
    refused(wrapped_for(keys, K1, K2), keys, CiphertextInvalid, rules(key_ids=("alias/web",)))


def test_kms_that_answers_with_another_key_is_not_believed(keys: LocalKeys) -> None:
    class Confused(LocalKeys):
        def decrypt(self, ciphertext: bytes, **options: Any) -> Decryption:  # type: ignore[override]
            return Decryption(super().decrypt(ciphertext, **options).plaintext, K3)

    confused = Confused()
    refused(sdk_message(confused, PLAINTEXT), confused, KmsAnswerInvalid)


def test_data_key_of_another_length_is_refused(keys: LocalKeys) -> None:
    error = refused(wrapped_for(keys, K1, K1, size_bytes=16), keys, CiphertextInvalid)
    assert "a data key of 16 bytes" in error.detail


# --- Encryption SDK messages: place, limits, authenticity --------------------------------------


BOUND = {"kmsfs:volume": "web", "kmsfs:path": "nginx/ssl.pem", "kmsfs:version": "1"}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"place": Place("web", "ssl.pem")}, ContextMismatch),
        ({"place": Place("mail", "nginx/ssl.pem")}, ContextMismatch),
        ({"encryption_context": {"service": "web"}}, ContextMismatch),
        ({"max_plaintext_bytes": 27}, FileTooLarge),
    ],
)
def test_what_shows_in_the_header_is_refused_before_kms_is_asked(
    keys: LocalKeys, given: dict[str, Any], error: type[KmsfsError]
) -> None:
    data = sdk_message(keys, PLAINTEXT, context=BOUND)
    place = {"place": Place("web", "nginx/ssl.pem")}
    refused(data, keys, error, rules(**{**place, **given}))
    assert sent(keys) == []
    assert decrypt(data, keys, rules(**place, binding_required=True))[0] == PLAINTEXT


def test_version_of_a_bound_message_comes_with_its_plaintext(keys: LocalKeys) -> None:
    bound = rules(place=Place("web", "nginx/ssl.pem"))
    data = sdk_message(keys, PLAINTEXT, context={**BOUND, "kmsfs:version": "12"})
    assert decrypt(data, keys, bound)[1].bound_version == 12
    assert decrypt(sdk_message(keys, PLAINTEXT), keys, bound)[1].bound_version is None


@pytest.mark.parametrize("suite_id", [0x0014, 0x0178, 0x0378])
def test_suite_without_commitment_needs_to_be_allowed(keys: LocalKeys, suite_id: int) -> None:
    data = sdk_message(keys, PLAINTEXT, suite_id=suite_id)
    refused(data, keys, AlgorithmNotAllowed)
    assert sent(keys) == []
    assert decrypt(data, keys, rules(allow_non_committing=True))[0] == PLAINTEXT


def test_long_frames_of_a_short_message_are_no_reason_to_refuse_it(keys: LocalKeys) -> None:
    data = sdk_message(keys, PLAINTEXT, frame_length=1 << 20)
    assert decrypt(data, keys, rules(max_plaintext_bytes=100))[0] == PLAINTEXT


@pytest.mark.parametrize("frame_length", [0, 128, 4096])
@pytest.mark.parametrize("size_bytes", [0, 1, 128, 4096, 70_000])
def test_messages_of_every_shape_are_decrypted(
    keys: LocalKeys, frame_length: int, size_bytes: int
) -> None:
    plaintext = os.urandom(size_bytes)
    data = sdk_message(keys, plaintext, frame_length=frame_length)
    assert decrypt(data, keys)[0] == plaintext


def own_writer(keys: LocalKeys, **options: Any) -> EsdkWriter:
    writer = EsdkWriter(os.urandom(32), [], **options)
    context = {**writer.context, **(writer.public_key_pair() if writer.signed else {})}
    wrapped = keys.encrypt(writer.data_key, key_id=K1, encryption_context=context).ciphertext
    writer.keys = [WrittenKey(b"aws-kms", K1.encode(), wrapped)]
    return writer


def test_corrupt_tag_of_the_last_frame_leaves_the_buffer_zeroed(keys: LocalKeys) -> None:
    data = bytearray(own_writer(keys).message(bytes(1000)))
    data[-1] ^= 1
    refused(bytes(data), keys, CiphertextInvalid)
    assert sent(keys) == [K1]


def test_corrupt_signature_leaves_the_buffer_zeroed(keys: LocalKeys) -> None:
    data = bytearray(own_writer(keys, signed=True).message(bytes(1000)))
    data[-1] ^= 1
    refused(bytes(data), keys, CiphertextInvalid)
    assert sent(keys) == [K1]


def test_signature_by_another_key_is_refused(keys: LocalKeys) -> None:
    writer = own_writer(keys, signed=True)
    writer.header()
    writer.final_frame(1, PLAINTEXT)
    from cryptography.hazmat.primitives.asymmetric import ec

    writer.signing_key = ec.generate_private_key(ec.SECP384R1())
    writer.footer()
    refused(writer.written, keys, CiphertextInvalid)


@pytest.mark.parametrize("frames", [[(2, 128), (2, 0)], [(1, 128), (1, 128), (3, 0)]])
def test_authentic_frames_out_of_order_are_refused(
    keys: LocalKeys, frames: list[tuple[int, int]]
) -> None:
    writer = own_writer(keys)
    writer.header()
    for sequence, size_bytes in frames[:-1]:
        writer.frame(sequence, bytes(size_bytes))
    writer.final_frame(frames[-1][0], bytes(frames[-1][1]))
    refused(writer.written, keys, CiphertextInvalid)


def test_end_in_the_middle_is_refused(keys: LocalKeys) -> None:
    writer = own_writer(keys)
    writer.header()
    writer.final_frame(1, bytes(120))
    rest = writer.written
    writer.final_frame(2, b"")
    # Both ends are authentic; whoever stops at the first would leave bytes unread.
    assert writer.written.startswith(rest)
    refused(writer.written, keys, CiphertextInvalid)


def test_frames_of_another_message_do_not_fit(keys: LocalKeys) -> None:
    one, other = own_writer(keys), own_writer(keys)
    one.header()
    other.header()
    other.message_id = one.message_id
    other.written = b""
    other.final_frame(1, PLAINTEXT)
    refused(one.written + other.written, keys, CiphertextInvalid)


def test_other_commitment_is_refused(keys: LocalKeys) -> None:
    writer = own_writer(keys)
    writer.header(commitment=os.urandom(32))
    writer.final_frame(1, PLAINTEXT)
    refused(writer.written, keys, CiphertextInvalid)


def test_signed_message_without_its_public_key_is_refused(keys: LocalKeys) -> None:
    writer = EsdkWriter(os.urandom(32), [], signed=True, raw_context=b"")
    wrapped = keys.encrypt(writer.data_key, key_id=K1, encryption_context={}).ciphertext
    writer.keys = [WrittenKey(b"aws-kms", K1.encode(), wrapped)]
    refused(writer.message(PLAINTEXT), keys, CiphertextInvalid)


@pytest.mark.parametrize("point", ["", "AA==", "not base64", "Ag==" * 12, "BA" * 33])
def test_garbled_public_key_is_refused(keys: LocalKeys, point: str) -> None:
    pairs = {"aws-crypto-public-key": point}
    writer = EsdkWriter(os.urandom(32), [], signed=True)
    writer.public_key_pair = lambda: pairs  # type: ignore[method-assign]
    wrapped = keys.encrypt(writer.data_key, key_id=K1, encryption_context=pairs).ciphertext
    writer.keys = [WrittenKey(b"aws-kms", K1.encode(), wrapped)]
    refused(writer.message(PLAINTEXT), keys, CiphertextInvalid)


def test_failure_to_allocate_comes_through_as_itself(keys: LocalKeys) -> None:
    def allocate(size_bytes: int) -> memoryview:
        raise LockedMemoryExhausted(f"no {size_bytes} bytes")

    for data in (sdk_message(keys, PLAINTEXT), blob(keys)):
        with pytest.raises(LockedMemoryExhausted):
            decrypt_ciphertext(data, rules(), keys, allocate)


def test_no_error_shows_content(keys: LocalKeys) -> None:
    secret = os.urandom(16).hex().encode()
    data = bytearray(own_writer(keys, signed=True).message(secret))
    data[-1] ^= 1
    error = refused(bytes(data), keys, CiphertextInvalid)
    assert secret.decode() not in f"{error!r} {error.detail} {error.hint} {error.__cause__!r}"
    assert error.__cause__ is None
