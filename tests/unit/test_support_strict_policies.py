"""The stand-in holds requests against key policies as KMS does, by the documentation's examples."""

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import ACCOUNT, Identity, StrictKms

ROOT = f"arn:aws:iam::{ACCOUNT}:root"

Statement = dict[str, Any]


def statement(principal: Any, *actions: str, **more: Any) -> Statement:
    allow = {"Effect": "Allow", "Principal": {"AWS": principal}, "Resource": "*"}
    return {**allow, "Action": list(actions), **more}


def policy(*statements: Statement) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


ALL_TO_ACCOUNT = statement(ROOT, "kms:*")


def code_of(call: Any, **parameters: Any) -> str:
    """The error code of a call; empty if it succeeds."""
    try:
        call(**parameters)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


@pytest.fixture
def user(strict_kms: StrictKms) -> Identity:
    """A user without IAM policies."""
    made = strict_kms.create_identity("user")
    strict_kms.withhold_policies(made)
    return made


def put(kms: StrictKms, key: KmsKey, *statements: Statement, **more: Any) -> str:
    """Set a key's policy as the admin; the error code, empty if it was accepted."""
    return code_of(kms.client().put_key_policy, KeyId=key.arn, Policy=policy(*statements), **more)


def encrypts(kms: StrictKms, key: KmsKey, identity: Identity, **context: str) -> bool:
    code = code_of(
        kms.client(identity).encrypt, KeyId=key.arn, Plaintext=b"-", EncryptionContext=context
    )
    assert code in ("", "AccessDeniedException")
    return not code


def test_account_delegates_to_iam_policies(
    strict_kms: StrictKms, kms_key: KmsKey, user: Identity
) -> None:
    assert put(strict_kms, kms_key, ALL_TO_ACCOUNT) == ""
    assert encrypts(strict_kms, kms_key, strict_kms.admin)
    assert not encrypts(strict_kms, kms_key, user)


def test_account_delegates_no_more_than_it_was_given(
    strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    assert put(strict_kms, kms_key, statement(ACCOUNT, "kms:Put*", "kms:Get*")) == ""
    assert not encrypts(strict_kms, kms_key, strict_kms.admin)
    found = strict_kms.client().get_key_policy(KeyId=kms_key.arn)
    assert json.loads(found["Policy"])["Statement"][0]["Action"] == ["kms:Put*", "kms:Get*"]


def test_named_identity_needs_no_iam_policy(
    strict_kms: StrictKms, kms_key: KmsKey, user: Identity
) -> None:
    put(strict_kms, kms_key, ALL_TO_ACCOUNT, statement([user.arn], "kms:encrypt"))
    assert encrypts(strict_kms, kms_key, user)
    refused = code_of(strict_kms.client(user).describe_key, KeyId=kms_key.arn)
    assert refused == "AccessDeniedException"


def test_named_identity_of_another_account_needs_both(
    strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_identity("other", account="999988887777")
    put(strict_kms, kms_key, ALL_TO_ACCOUNT, statement(other.arn, "kms:Encrypt"))
    assert encrypts(strict_kms, kms_key, other)
    strict_kms.withhold_policies(other)
    assert not encrypts(strict_kms, kms_key, other)


def test_deny_goes_before_every_allow(strict_kms: StrictKms, kms_key: KmsKey) -> None:
    deny = {**statement("*", "kms:Encrypt"), "Effect": "Deny"}
    put(strict_kms, kms_key, ALL_TO_ACCOUNT, deny)
    assert not encrypts(strict_kms, kms_key, strict_kms.admin)


@pytest.mark.parametrize(
    ("condition", "context", "holds"),
    [
        ({"StringEquals": {"kms:EncryptionContext:a": "b"}}, {"a": "b", "c": "d"}, True),
        ({"StringEquals": {"kms:EncryptionContext:A": "b"}}, {"a": "b"}, True),
        ({"StringEquals": {"kms:EncryptionContext:a": "B"}}, {"a": "b"}, False),
        ({"StringEquals": {"kms:EncryptionContext:a": "b"}}, {}, False),
        ({"StringEquals": {"kms:EncryptionContext:a": ["x", "b"]}}, {"a": "b"}, True),
        ({"StringEquals": {"kms:EncryptionContext:a": "*"}}, {"a": "b"}, False),
        ({"StringLike": {"kms:EncryptionContext:a": "b*"}}, {"a": "bc"}, True),
        ({"StringNotEquals": {"kms:EncryptionContext:a": "b"}}, {}, True),
        ({"Null": {"kms:EncryptionContext:a": True}}, {"a": "b"}, False),
        (
            {"StringEquals": {"kms:EncryptionContext:a": "b", "kms:EncryptionContext:c": "d"}},
            {"a": "b"},
            False,
        ),
        ({"StringEquals": {"kms:CallerAccount": ACCOUNT}}, {}, True),
        ({"StringEquals": {"kms:CallerAccount": "999988887777"}}, {}, False),
        ({"Bool": {"kms:ReEncryptOnSameKey": "false"}}, {}, False),
    ],
)
def test_condition(
    *,
    strict_kms: StrictKms,
    kms_key: KmsKey,
    user: Identity,
    condition: Statement,
    context: dict[str, str],
    holds: bool,
) -> None:
    conditional = statement(user.arn, "kms:Encrypt", Condition=condition)
    assert put(strict_kms, kms_key, ALL_TO_ACCOUNT, conditional) == ""
    assert encrypts(strict_kms, kms_key, user, **context) == holds


@pytest.mark.parametrize(("same", "to", "code"), [
    (True, "b", ""),
    (True, "c", "AccessDeniedException"),
    (False, "b", "AccessDeniedException"),
])  # fmt: skip
def test_re_encrypt_is_authorized_at_both_ends(
    *, strict_kms: StrictKms, kms_key: KmsKey, user: Identity, same: bool, to: str, code: str
) -> None:
    bound = statement(
        user.arn,
        "kms:ReEncrypt*",
        Condition={
            "Bool": {"kms:ReEncryptOnSameKey": True},
            "StringEquals": {"kms:EncryptionContext:a": "b"},
        },
    )
    put(strict_kms, kms_key, ALL_TO_ACCOUNT, bound)
    other = strict_kms.create_key(policy=policy(statement(user.arn, "kms:*")))
    found = code_of(
        strict_kms.client(user).re_encrypt,
        CiphertextBlob=kms_key.seal(b"-", {"a": "b"}),
        SourceEncryptionContext={"a": "b"},
        DestinationKeyId=(kms_key if same else other).arn,
        DestinationEncryptionContext={"a": to},
    )
    assert found == code


def test_policy_that_locks_its_caller_out_is_refused(
    strict_kms: StrictKms, kms_key: KmsKey, user: Identity
) -> None:
    to_another = statement(user.arn, "kms:*")
    assert put(strict_kms, kms_key, to_another) == "MalformedPolicyDocumentException"
    deny = {**statement("*", "kms:PutKeyPolicy"), "Effect": "Deny"}
    assert put(strict_kms, kms_key, ALL_TO_ACCOUNT, deny) == "MalformedPolicyDocumentException"
    assert kms_key.policy is None
    client = strict_kms.client()
    assert code_of(client.create_key, Policy=policy(to_another)).startswith("MalformedPolicy")
    bypassed = {"BypassPolicyLockoutSafetyCheck": True}
    assert put(strict_kms, kms_key, to_another, **bypassed) == ""
    assert put(strict_kms, kms_key, ALL_TO_ACCOUNT) == "AccessDeniedException"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        policy(),
        json.dumps({"Statement": [ALL_TO_ACCOUNT]}),
        policy({**ALL_TO_ACCOUNT, "Effect": "allow"}),
        policy({**ALL_TO_ACCOUNT, "Principals": "*"}),
        policy({"Effect": "Allow", "Action": "kms:*", "Resource": "*"}),
        policy(ALL_TO_ACCOUNT, statement(f"arn:aws:iam::{ACCOUNT}:role/nobody", "kms:Decrypt")),
        policy({**ALL_TO_ACCOUNT, "Sid": "a"}, {**ALL_TO_ACCOUNT, "Sid": "a"}),
        policy({**ALL_TO_ACCOUNT, "Condition": {"StringIs": {"a": "b"}}}),
    ],
)
def test_what_is_no_policy_is_refused(strict_kms: StrictKms, kms_key: KmsKey, text: str) -> None:
    code = code_of(strict_kms.client().put_key_policy, KeyId=kms_key.arn, Policy=text)
    assert code == "MalformedPolicyDocumentException"


def test_policy_of_more_than_32_kib_is_refused(strict_kms: StrictKms, kms_key: KmsKey) -> None:
    text = policy(ALL_TO_ACCOUNT) + " " * (32 << 10)
    code = code_of(strict_kms.client().put_key_policy, KeyId=kms_key.arn, Policy=text)
    assert code == "LimitExceededException"


def test_new_key_has_the_default_policy_and_no_rotation(strict_kms: StrictKms) -> None:
    client = strict_kms.client()
    arn = client.create_key(Description="d", MultiRegion=True)["KeyMetadata"]["Arn"]
    assert ":key/mrk-" in arn
    found = json.loads(client.get_key_policy(KeyId=arn)["Policy"])
    assert found["Statement"][0]["Sid"] == "Enable IAM User Permissions"
    assert client.get_key_rotation_status(KeyId=arn)["KeyRotationEnabled"] is False
    client.enable_key_rotation(KeyId=arn)
    assert client.get_key_rotation_status(KeyId=arn)["KeyRotationEnabled"] is True
