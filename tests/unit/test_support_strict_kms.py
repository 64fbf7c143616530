"""The stand-in is as strict as KMS: seen through a client that is not ours."""

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
from botocore.exceptions import ClientError

from kmsfs.formats.detect import Format, detect
from tests.support.canary import carries, secret
from tests.support.strict_keys import MAGICS, BlobInvalidError, KmsKey, canonical
from tests.support.strict_kms import StrictKms

PLAINTEXT = secret("strict", 100)


@pytest.fixture
def client(strict_kms: StrictKms) -> Any:
    return strict_kms.client()


def code_of(call: Any, **parameters: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**parameters)
    return str(caught.value.response["Error"]["Code"])


def test_round_trip_through_every_operation_that_encrypts(client: Any, kms_key: KmsKey) -> None:
    context = {"a": "b"}

    def opened(made: dict[str, Any]) -> bytes:
        found = client.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=context)
        assert found["KeyId"] == made["KeyId"] == kms_key.arn
        return bytes(found["Plaintext"])

    common = {"KeyId": kms_key.arn, "EncryptionContext": context}
    assert opened(client.encrypt(Plaintext=PLAINTEXT, **common)) == PLAINTEXT
    made = client.generate_data_key(NumberOfBytes=48, **common)
    assert opened(made) == made["Plaintext"]
    assert len(opened(client.generate_data_key_without_plaintext(**common))) == 32


def test_re_encrypt_changes_key_and_context(
    client: Any, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key()
    blob = client.re_encrypt(
        CiphertextBlob=kms_key.seal(PLAINTEXT, {"a": "b"}),
        SourceEncryptionContext={"a": "b"},
        DestinationKeyId=other.arn,
        DestinationEncryptionContext={"c": "d"},
    )["CiphertextBlob"]
    assert other.open(blob, {"c": "d"}) == PLAINTEXT
    assert code_of(client.decrypt, CiphertextBlob=blob) == "InvalidCiphertextException"


def test_life_of_a_key(client: Any) -> None:
    arn = client.create_key()["KeyMetadata"]["Arn"]
    client.create_alias(AliasName="alias/life", TargetKeyId=arn)
    blob = client.encrypt(KeyId="alias/life", Plaintext=b"-")["CiphertextBlob"]
    client.disable_key(KeyId=arn)
    assert code_of(client.decrypt, CiphertextBlob=blob) == "DisabledException"
    assert client.describe_key(KeyId="alias/life")["KeyMetadata"]["KeyState"] == "Disabled"
    client.enable_key(KeyId=arn)
    assert client.decrypt(CiphertextBlob=blob)["Plaintext"] == b"-"
    client.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
    assert code_of(client.decrypt, CiphertextBlob=blob) == "KMSInvalidStateException"
    assert code_of(client.enable_key, KeyId=arn) == "KMSInvalidStateException"
    client.cancel_key_deletion(KeyId=arn)
    assert code_of(client.decrypt, CiphertextBlob=blob) == "DisabledException"
    taken = code_of(client.create_alias, AliasName="alias/life", TargetKeyId=arn)
    assert taken == "AlreadyExistsException"


def test_bounds_of_the_service_model_hold(
    strict_kms: StrictKms, client: Any, kms_key: KmsKey
) -> None:
    too_long = code_of(client.encrypt, KeyId=kms_key.arn, Plaintext=bytes(4097))
    assert too_long == "ValidationException"
    too_long = code_of(client.decrypt, CiphertextBlob=bytes(6145))
    assert too_long == "ValidationException"
    both = code_of(client.generate_data_key, KeyId=kms_key.arn, NumberOfBytes=32, KeySpec="AES_256")
    assert both == "ValidationException"


@pytest.mark.parametrize(
    "parameters",
    [
        {"KeyId": 7, "Plaintext": "YQ=="},
        {"KeyId": "k", "Plaintext": "no base64!"},
        {"KeyId": "k", "Plaintext": ["YQ=="]},
        {"KeyId": "k", "Plaintext": "YQ==", "EncryptionContext": {"a": 1}},
        {"KeyId": "k", "Plaintext": "YQ==", "EncryptionContext": ["a"]},
        ["KeyId"],
    ],
)
def test_wrong_types_are_no_request(strict_kms: StrictKms, parameters: Any) -> None:
    client = strict_kms.client()

    def replace_body(request: Any, **_: Any) -> None:
        request.data = json.dumps(parameters).encode()

    client.meta.events.register_first("before-sign.kms", replace_body)
    assert code_of(client.encrypt, KeyId="k", Plaintext=b"-") == "SerializationException"


def test_unsigned_request_is_refused(strict_kms: StrictKms) -> None:
    request = urllib.request.Request(
        strict_kms.endpoint_url, b"{}", {"X-Amz-Target": "TrentService.Decrypt"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)
    with caught.value as answer:
        assert json.load(answer)["__type"] == "MissingAuthenticationTokenException"


def test_altered_body_breaks_the_signature(strict_kms: StrictKms, kms_key: KmsKey) -> None:
    client = strict_kms.client()

    def alter(request: Any, **_: Any) -> None:
        request.body = request.body.replace(b"YQ==", b"Yg==")

    client.meta.events.register("before-send.kms", alter)
    refused = code_of(client.encrypt, KeyId=kms_key.arn, Plaintext=b"a")
    assert refused == "InvalidSignatureException"


def test_denied_and_missing_keys_look_alike_to_who_names_none(
    strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    identity = strict_kms.create_identity("other")
    strict_kms.deny(identity, "Decrypt", kms_key)
    client = strict_kms.client(identity)
    messages = set()
    for key in (kms_key, KmsKey(kms_key.account, kms_key.region)):
        with pytest.raises(ClientError) as caught:
            client.decrypt(CiphertextBlob=key.seal(PLAINTEXT, {}))
        messages.add(
            (caught.value.response["Error"]["Code"], caught.value.response["Error"]["Message"])
        )
    assert len(messages) == 1
    strict_kms.allow(identity, "Decrypt", kms_key)
    assert client.decrypt(CiphertextBlob=kms_key.seal(b"-", {}))["Plaintext"] == b"-"


def test_dry_run_succeeds_as_an_error_only(client: Any, kms_key: KmsKey) -> None:
    blob = kms_key.seal(PLAINTEXT, {})
    done = code_of(client.decrypt, CiphertextBlob=blob, DryRun=True)
    assert done == "DryRunOperationException"
    done = code_of(
        client.decrypt, KeyId=kms_key.arn, DryRun=True, DryRunModifiers=["IGNORE_CIPHERTEXT"]
    )
    assert done == "DryRunOperationException"
    kms_key.state = "Disabled"
    assert code_of(client.decrypt, CiphertextBlob=blob, DryRun=True) == "DisabledException"


def test_contexts_that_look_alike_differ() -> None:
    assert canonical({"ab": "c"}) != canonical({"a": "bc"})
    assert canonical({"a": "b", "c": "d"}) == canonical({"c": "d", "a": "b"})
    assert canonical({}) != canonical({"": ""})


@pytest.mark.parametrize("magic", MAGICS)
def test_blobs_have_the_shape_of_todays(kms_key: KmsKey, magic: bytes) -> None:
    kms_key.magic = magic
    blob = kms_key.seal(bytes(32), {})
    # A data key of 32 bytes under KMS: 184 bytes, and these beginnings.
    assert len(blob) == 184
    assert detect(blob) is Format.KMS_BLOB
    assert base64.b64encode(blob).startswith((b"AQICAH", b"AQIDAH"))


def test_every_altered_byte_of_a_blob_is_noticed(kms_key: KmsKey) -> None:
    blob = kms_key.seal(b"short", {"a": "b"})
    for at in range(len(blob)):
        altered = bytearray(blob)
        altered[at] ^= 0x41
        with pytest.raises(BlobInvalidError):
            kms_key.open(bytes(altered), {"a": "b"})


def test_failures_are_injected_as_often_as_asked(
    strict_kms: StrictKms, client: Any, kms_key: KmsKey
) -> None:
    strict_kms.fail("ThrottlingException", times=2, operation="DescribeKey")
    assert client.encrypt(KeyId=kms_key.arn, Plaintext=b"-")
    for _ in range(2):
        assert code_of(client.describe_key, KeyId=kms_key.arn) == "ThrottlingException"
    assert client.describe_key(KeyId=kms_key.arn)
    strict_kms.fail("KeyUnavailableException", key=kms_key)
    other = strict_kms.create_key()
    assert code_of(client.encrypt, KeyId=kms_key.arn, Plaintext=b"-") == "KeyUnavailableException"
    assert client.encrypt(KeyId=other.arn, Plaintext=b"-")
    strict_kms.heal()
    assert client.encrypt(KeyId=kms_key.arn, Plaintext=b"-")


def test_latency_is_that_of_key_and_context(
    strict_kms: StrictKms, client: Any, kms_key: KmsKey
) -> None:
    kms_key.latency_s = 0.05
    strict_kms.slow_contexts["path", "slow"] = 0.1
    for context in ({}, {"path": "slow"}):
        client.encrypt(KeyId=kms_key.arn, Plaintext=b"-", EncryptionContext=context)
    first, second = strict_kms.calls("Encrypt")
    assert first.ended - first.started >= 0.05
    assert second.ended - second.started >= 0.15


def test_journal_holds_no_plaintext(strict_kms: StrictKms, client: Any, kms_key: KmsKey) -> None:
    blob = client.encrypt(KeyId=kms_key.arn, Plaintext=PLAINTEXT)["CiphertextBlob"]
    client.decrypt(CiphertextBlob=blob)
    calls = strict_kms.wait_for_calls(2)
    assert [call.operation for call in calls] == ["Encrypt", "Decrypt"]
    assert not carries(repr(calls))
    assert kms_key.secret.hex() not in repr(kms_key)


def test_as_a_process_it_says_where_it_is_and_ends_with_its_input() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.strict_kms", "--keys", "2", "--slow-key", "1:1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        known = json.loads(process.stdout.readline())
        assert len(known["key_arns"]) == 2
        assert known["env"]["AWS_ENDPOINT_URL"] == known["endpoint_url"]
        process.stdin.close()
        assert process.wait(10) == 0
