"""AWS KMS through botocore, against the strict stand-in."""

import concurrent.futures
import logging
import os

import botocore.exceptions
import pytest

from kmsfs.errors import (
    CiphertextInvalid,
    ConfigInvalid,
    CredentialsUnavailable,
    IncorrectKey,
    KeyAccessDenied,
    KeyNotFound,
    KeyUnusable,
    KmsAnswerInvalid,
    KmsfsError,
    KmsThrottled,
    KmsUnreachable,
    PlaintextTooLarge,
    RegionUnknown,
    UsageInvalid,
)
from kmsfs.keys import aws_errors, aws_session
from kmsfs.keys.aws import AwsKeyService
from kmsfs.settings import KmsSettings
from tests.support.aws_files import AwsFiles
from tests.support.canary import carries, secret
from tests.support.strict_keys import MAGICS, KmsKey
from tests.support.strict_kms import StrictKms

CONTEXT = {"service": "web", "ärger": "ja"}
PLAINTEXT = secret("keys", 200)


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for seconds; those that matter are in the fault tests."""
    monkeypatch.setattr(aws_session, "ATTEMPTS", 1)


@pytest.fixture(autouse=True)
def _as_admin(aws_files: AwsFiles, strict_kms: StrictKms) -> None:
    aws_files.set_environment(strict_kms.env())


@pytest.fixture
def keys() -> AwsKeyService:
    return AwsKeyService(KmsSettings())


def decrypt(keys: AwsKeyService, blob: bytes, key_id: str | None) -> bytes:
    return keys.decrypt(blob, key_id=key_id, encryption_context=CONTEXT).plaintext


# --- what works --------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", MAGICS)
@pytest.mark.parametrize("size_bytes", [1, 32, 4096])
def test_what_is_encrypted_is_decrypted(
    keys: AwsKeyService, kms_key: KmsKey, size_bytes: int, magic: bytes
) -> None:
    kms_key.magic = magic
    plaintext = secret("round trip", size_bytes)
    made = keys.encrypt(plaintext, key_id=kms_key.arn, encryption_context=CONTEXT)
    found = keys.decrypt(made.ciphertext, key_id=kms_key.arn, encryption_context=CONTEXT)
    assert found.plaintext == plaintext
    assert found.key_arn == made.key_arn == kms_key.arn


def test_key_is_sent_as_it_was_given_and_answered_by_arn(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    alias_arn = kms_key.arn.replace(f"key/{kms_key.key_id}", "alias/test")
    for key_id in (kms_key.arn, kms_key.key_id, "alias/test", alias_arn, None):
        assert keys.decrypt(blob, key_id=key_id, encryption_context=CONTEXT).key_arn == kms_key.arn
        call = strict_kms.calls("Decrypt")[-1]
        assert (call.key_id, call.context) == (key_id, CONTEXT)


@pytest.mark.parametrize("with_ciphertext", [True, False])
def test_question_whether_kms_would_decrypt_makes_no_plaintext(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey, with_ciphertext: bool
) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT) if with_ciphertext else None
    keys.would_decrypt(blob, key_id=kms_key.arn, encryption_context=CONTEXT)
    (call,) = strict_kms.calls("Decrypt")
    assert (call.error, call.context) == ("DryRunOperationException", CONTEXT)
    strict_kms.deny(strict_kms.admin, "Decrypt", kms_key)
    with pytest.raises(KeyAccessDenied):
        keys.would_decrypt(blob, key_id=kms_key.arn, encryption_context=CONTEXT)


def test_question_whether_kms_would_decrypt_is_about_the_ciphertext_too(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    with pytest.raises(CiphertextInvalid):
        keys.would_decrypt(blob, key_id=kms_key.arn, encryption_context={})
    with pytest.raises(IncorrectKey):
        keys.would_decrypt(blob, key_id=strict_kms.create_key().arn, encryption_context=CONTEXT)
    keys.would_decrypt(blob, key_id=None, encryption_context=CONTEXT)


@pytest.mark.parametrize("size_bytes", [1, 16, 32, 1024])
def test_data_key_is_wrapped_under_its_context(
    keys: AwsKeyService, kms_key: KmsKey, size_bytes: int
) -> None:
    made = keys.generate_data_key(
        key_id=kms_key.arn, size_bytes=size_bytes, encryption_context=CONTEXT
    )
    assert len(made.plaintext) == size_bytes
    assert decrypt(keys, made.ciphertext, made.key_arn) == made.plaintext
    with pytest.raises(CiphertextInvalid):
        keys.decrypt(made.ciphertext, key_id=None, encryption_context={})


def test_blob_is_encrypted_anew_without_its_plaintext(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key()
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    for source_key_id in (kms_key.arn, None):
        made = keys.re_encrypt(
            blob, source_key_id=source_key_id, key_id=other.arn, encryption_context=CONTEXT
        )
        assert (made.source_key_arn, made.key_arn) == (kms_key.arn, other.arn)
        assert other.open(made.ciphertext, CONTEXT) == PLAINTEXT
    assert {call.operation for call in strict_kms.calls()} == {"ReEncrypt"}
    with pytest.raises(IncorrectKey):
        keys.re_encrypt(blob, source_key_id=other.arn, key_id=other.arn, encryption_context=CONTEXT)
    with pytest.raises(CiphertextInvalid):
        keys.re_encrypt(blob, source_key_id=None, key_id=other.arn, encryption_context={})
    with pytest.raises(CiphertextInvalid):
        keys.re_encrypt(b"", source_key_id=None, key_id=other.arn, encryption_context={})


def test_alias_and_key_id_are_resolved_to_the_arn(keys: AwsKeyService, kms_key: KmsKey) -> None:
    for key_id in ("alias/test", kms_key.key_id, kms_key.arn):
        assert keys.resolve_key_arn(key_id) == kms_key.arn


def test_each_region_is_asked_for_its_own_keys(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key(region="eu-central-1")
    for key in (kms_key, other, kms_key):
        assert decrypt(keys, key.seal(PLAINTEXT, CONTEXT), key.arn) == PLAINTEXT
    regions = [call.region for call in strict_kms.calls("Decrypt")]
    assert regions == ["us-east-1", "eu-central-1", "us-east-1"]


def test_region_of_the_settings_is_for_keys_without_one(strict_kms: StrictKms) -> None:
    key = strict_kms.create_key(region="ap-south-1", alias="alias/there")
    keys = AwsKeyService(KmsSettings(region="ap-south-1"))
    assert keys.resolve_key_arn("alias/there") == key.arn
    assert decrypt(keys, key.seal(PLAINTEXT, CONTEXT), None) == PLAINTEXT


def test_region_of_an_arn_does_not_stick_to_keys_without_one(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key(region="eu-central-1")
    aws_files.monkeypatch.delenv("AWS_DEFAULT_REGION")
    keys = AwsKeyService(KmsSettings())
    assert keys.resolve_key_arn(other.arn) == other.arn
    with pytest.raises(RegionUnknown):
        keys.resolve_key_arn("alias/test")
    assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn


def test_threads_may_share_a_service(keys: AwsKeyService, kms_key: KmsKey) -> None:
    kms_key.latency_s = 0.05
    blobs = [kms_key.seal(secret(str(number), 64), CONTEXT) for number in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda blob: decrypt(keys, blob, kms_key.arn), blobs))
    assert found == [secret(str(number), 64) for number in range(16)]


def test_answers_have_no_plaintext_in_their_repr(keys: AwsKeyService, kms_key: KmsKey) -> None:
    found = keys.decrypt(kms_key.seal(PLAINTEXT, {}), key_id=kms_key.arn, encryption_context={})
    made = keys.generate_data_key(key_id=kms_key.arn, size_bytes=32, encryption_context={})
    assert not carries(repr(found))
    assert repr(made.plaintext)[2:-1] not in repr(made)


def test_endpoint_of_the_settings_comes_before_that_of_the_environment(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    keys = AwsKeyService(KmsSettings(endpoint_url=strict_kms.endpoint_url))
    assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn


def test_levels_of_foreign_loggers_are_left_alone(keys: AwsKeyService, kms_key: KmsKey) -> None:
    names = ("botocore", "botocore.endpoint", "botocore.parsers", "urllib3")
    before = [logging.getLogger(name).level for name in names]
    keys.resolve_key_arn(kms_key.arn)
    assert [logging.getLogger(name).level for name in names] == before


# --- what KMS refuses --------------------------------------------------------------------------


def test_denied_key_is_told_with_operation_key_and_code(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    strict_kms.deny(strict_kms.admin, "Decrypt", kms_key)
    with pytest.raises(KeyAccessDenied) as caught:
        decrypt(keys, kms_key.seal(PLAINTEXT, CONTEXT), kms_key.arn)
    detail = caught.value.detail
    assert detail.startswith(f"Decrypt under {kms_key.arn}: AccessDeniedException (request ")
    assert keys.encrypt(b"-", key_id=kms_key.arn, encryption_context={}).key_arn == kms_key.arn


def test_request_is_known_by_its_id_key_and_signer_but_by_nothing_secret(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    blob = keys.encrypt(PLAINTEXT, key_id=kms_key.arn, encryption_context=CONTEXT).ciphertext
    call = keys.decrypt(blob, key_id=None, encryption_context=CONTEXT).call
    assert call is not None
    assert (call.key_id, call.principal) == (kms_key.arn, None)
    assert call.access_key_id == strict_kms.admin.access_key_id
    assert call.request_id

    strict_kms.deny(strict_kms.admin, "Decrypt", kms_key)
    with pytest.raises(KeyAccessDenied) as caught:
        decrypt(keys, blob, kms_key.arn)
    denied = caught.value.call
    assert denied is not None
    assert (denied.key_id, denied.principal) == (kms_key.arn, strict_kms.admin.arn)
    assert denied.request_id != call.request_id
    assert f"(request {denied.request_id})" in caught.value.detail
    assert strict_kms.admin.secret_access_key not in repr((call, denied))


@pytest.mark.parametrize(
    "message",
    ["User: root is not authorized", "User: arn:aws:iam::1:user/a is not authorized", "", None]
    + ["User: arn:aws:iam::111122223333:user/a\nb is not authorized", "no permission"],
)
def test_principal_that_is_no_arn_is_not_repeated(message: str | None) -> None:
    error = botocore.exceptions.ClientError(
        {"Error": {"Code": "AccessDeniedException", "Message": message}},  # type: ignore[typeddict-item] # None
        "Decrypt",
    )
    call = aws_errors.translate_client_error(error, "Decrypt", None).call
    assert call is not None
    assert call.principal is None


def test_error_has_no_cause_that_could_hold_content(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    strict_kms.deny(strict_kms.admin, "Encrypt")
    with pytest.raises(KeyAccessDenied) as caught:
        keys.encrypt(PLAINTEXT, key_id=kms_key.arn, encryption_context=CONTEXT)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_key_of_another_account_is_denied_until_shared(
    keys: AwsKeyService, strict_kms: StrictKms
) -> None:
    key = strict_kms.create_key(account="444455556666")
    blob = key.seal(PLAINTEXT, CONTEXT)
    for key_id in (key.arn, None):
        with pytest.raises(KeyAccessDenied):
            decrypt(keys, blob, key_id)
    strict_kms.share(key, strict_kms.admin.account)
    assert decrypt(keys, blob, key.arn) == PLAINTEXT


@pytest.mark.parametrize("state", ["Disabled", "PendingDeletion", "PendingImport", "Unavailable"])
def test_key_that_is_not_enabled_is_unusable(
    keys: AwsKeyService, kms_key: KmsKey, state: str
) -> None:
    kms_key.state = state
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    for key_id in (kms_key.arn, None):
        with pytest.raises(KeyUnusable):
            decrypt(keys, blob, key_id)


def test_key_for_signing_is_unusable_and_the_hint_names_the_usage(
    keys: AwsKeyService, strict_kms: StrictKms
) -> None:
    key = strict_kms.create_key(usage="SIGN_VERIFY")
    with pytest.raises(KeyUnusable) as caught:
        keys.encrypt(b"-", key_id=key.arn, encryption_context={})
    assert "ENCRYPT_DECRYPT" in caught.value.hint


def test_blob_of_another_key_is_refused_as_that(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    blob = strict_kms.create_key().seal(PLAINTEXT, CONTEXT)
    with pytest.raises(IncorrectKey):
        decrypt(keys, blob, kms_key.arn)


def test_key_that_does_not_exist_is_not_found(keys: AwsKeyService, kms_key: KmsKey) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    missing = kms_key.arn[:-1] + ("0" if kms_key.arn[-1] != "0" else "1")
    for key_id in (missing, "alias/missing", "no-such-key"):
        with pytest.raises(KeyNotFound):
            decrypt(keys, blob, key_id)
        with pytest.raises(KeyNotFound):
            keys.resolve_key_arn(key_id)


def test_arn_of_another_service_is_not_found(keys: AwsKeyService) -> None:
    with pytest.raises(KeyNotFound):
        keys.resolve_key_arn("arn:aws:s3:us-east-1:111122223333:bucket/x")


def test_altered_blob_is_invalid_wherever_it_is_altered(
    keys: AwsKeyService, kms_key: KmsKey
) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    for at in (0, 40, 50, 60, 100, len(blob) - 1):
        altered = bytearray(blob)
        altered[at] ^= 1
        with pytest.raises(CiphertextInvalid):
            decrypt(keys, bytes(altered), kms_key.arn)
    for changed in (blob[:-1], blob + b"\0", b"no blob at all"):
        with pytest.raises(CiphertextInvalid):
            decrypt(keys, changed, kms_key.arn)


@pytest.mark.parametrize("context", [{}, {"service": "web"}, {**CONTEXT, "more": ""}])
def test_other_context_is_invalid(
    keys: AwsKeyService, kms_key: KmsKey, context: dict[str, str]
) -> None:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    with pytest.raises(CiphertextInvalid) as caught:
        keys.decrypt(blob, key_id=kms_key.arn, encryption_context=context)
    assert "encryption context" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ThrottlingException", KmsThrottled),
        ("LimitExceededException", KmsThrottled),
        ("TooManyRequestsException", KmsThrottled),
        ("DependencyTimeoutException", KmsUnreachable),
        ("KMSInternalException", KmsUnreachable),
        ("KeyUnavailableException", KmsUnreachable),
        ("ServiceUnavailable", KmsUnreachable),
        ("InternalFailure", KmsUnreachable),
        ("InvalidGrantTokenException", KeyAccessDenied),
        ("AccessDeniedException", KeyAccessDenied),
        ("OptInRequired", CredentialsUnavailable),
        ("IncompleteSignature", CredentialsUnavailable),
        ("MissingAuthenticationTokenException", CredentialsUnavailable),
        ("RequestExpired", CredentialsUnavailable),
        ("InvalidClientTokenId", CredentialsUnavailable),
        ("InvalidSignatureException", CredentialsUnavailable),
        ("ValidationException", KmsAnswerInvalid),
        ("SomethingNewException", KmsAnswerInvalid),
    ],
)
def test_code_is_translated(
    keys: AwsKeyService,
    strict_kms: StrictKms,
    kms_key: KmsKey,
    code: str,
    expected: type[KmsfsError],
) -> None:
    strict_kms.fail(code)
    with pytest.raises(KmsfsError) as caught:
        decrypt(keys, kms_key.seal(PLAINTEXT, CONTEXT), kms_key.arn)
    assert type(caught.value) is expected
    assert code in caught.value.detail


def test_code_that_is_no_code_is_not_repeated(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    strict_kms.fail("<b>" + PLAINTEXT.decode()[:40] + "</b>")
    with pytest.raises(KmsAnswerInvalid, match="no error code"):
        decrypt(keys, kms_key.seal(PLAINTEXT, CONTEXT), kms_key.arn)


# --- what is refused here ----------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 6145])
def test_what_is_no_blob_by_its_size_is_not_sent(
    keys: AwsKeyService, strict_kms: StrictKms, size_bytes: int
) -> None:
    with pytest.raises(CiphertextInvalid):
        keys.decrypt(bytes(size_bytes), key_id=None, encryption_context={})
    assert strict_kms.calls() == []


def test_too_much_or_no_plaintext_is_not_sent(
    keys: AwsKeyService, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    with pytest.raises(PlaintextTooLarge):
        keys.encrypt(bytes(4097), key_id=kms_key.arn, encryption_context={})
    with pytest.raises(UsageInvalid):
        keys.encrypt(b"", key_id=kms_key.arn, encryption_context={})
    for size_bytes in (0, 1025):
        with pytest.raises(UsageInvalid):
            keys.generate_data_key(key_id=kms_key.arn, size_bytes=size_bytes, encryption_context={})
    assert strict_kms.calls() == []


def test_parameters_that_botocore_refuses_are_configuration(keys: AwsKeyService) -> None:
    with pytest.raises(ConfigInvalid):
        keys.decrypt(b"-", key_id="", encryption_context={})
    number: dict[str, str] = {"a": 1}  # type: ignore[dict-item]
    with pytest.raises(ConfigInvalid):
        keys.decrypt(b"-", key_id=None, encryption_context=number)


def test_endpoint_that_is_no_url_is_configuration(kms_key: KmsKey) -> None:
    for url in ("not a url", "ftp//x", "http://"):
        with pytest.raises(ConfigInvalid):
            AwsKeyService(KmsSettings(endpoint_url=url)).resolve_key_arn(kms_key.arn)


def test_region_that_is_no_region_is_unknown() -> None:
    with pytest.raises(RegionUnknown):
        AwsKeyService(KmsSettings(region="no region!")).resolve_key_arn("alias/test")


def test_no_deadline_left_asks_nobody(strict_kms: StrictKms, kms_key: KmsKey) -> None:
    keys = AwsKeyService(KmsSettings())
    keys.set_deadline(0)
    with pytest.raises(KmsUnreachable):
        keys.resolve_key_arn(kms_key.arn)
    assert strict_kms.calls() == []
    keys.set_deadline(None)
    assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn


def test_every_error_of_the_model_has_a_translation() -> None:
    """A new service model with new errors for our operations must be looked at."""
    from kmsfs.keys.aws_errors import _BY_CODE
    from tests.support.strict_model import kms_model

    possible = {
        shape.name
        for operation in ("Decrypt", "Encrypt", "GenerateDataKey", "DescribeKey")
        for shape in kms_model().operation_model(operation).error_shapes
    }
    # Only answers to DryRun, which is not sent.
    assert possible - _BY_CODE.keys() == {"DryRunOperationException"}


def test_environment_is_not_changed_by_calls(keys: AwsKeyService, kms_key: KmsKey) -> None:
    before = dict(os.environ)
    keys.resolve_key_arn(kms_key.arn)
    assert dict(os.environ) == before
