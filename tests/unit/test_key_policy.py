"""Key policies and IAM policies: what they say, and what a strict KMS makes of them."""

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from kmsfs.errors import UsageInvalid
from kmsfs.manage.key_policy import (
    MAX_POLICY_BYTES,
    Account,
    Principals,
    iam_policies,
    key_name,
    key_policy,
    policy_text,
    volume_pairs,
)
from tests.support.canary import secret
from tests.support.key_roles import KeyRoles, arn_of
from tests.support.strict_identities import Identity
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import ACCOUNT, StrictKms

PLAINTEXT = secret("policy", 60)
PAIRS = volume_pairs("web", {"service": "shop"})
CONTEXT = {**PAIRS, "kmsfs:path": "ssl.pem", "kmsfs:version": "1"}
HERE = Account(ACCOUNT, "aws")
DENIED = "AccessDeniedException"
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture
def roles(strict_kms: StrictKms) -> KeyRoles:
    return KeyRoles.create(strict_kms)


def policy_for(roles: KeyRoles, *, multi_region: bool = False) -> dict[str, Any]:
    principals = Principals(
        (arn_of(roles.reader),), (arn_of(roles.writer),), (arn_of(roles.admin),)
    )
    return key_policy(HERE, principals, PAIRS, multi_region=multi_region)


@pytest.fixture
def key(strict_kms: StrictKms, roles: KeyRoles) -> KmsKey:
    """A key under the policy of these roles."""
    strict_kms.client().create_key(Policy=policy_text(policy_for(roles)))
    return strict_kms.keys()[-1]


class Caller:
    """Asks for operations with one key; each answers with the error code, empty for success."""

    def __init__(self, kms: StrictKms, key: KmsKey, who: Identity) -> None:
        self._client = kms.client(who)
        self._key = key

    def _code(self, operation: str, **parameters: Any) -> str:
        try:
            getattr(self._client, operation)(**parameters)
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        return ""

    def decrypt(self, context: dict[str, str]) -> str:
        blob = self._key.seal(PLAINTEXT, context)
        return self._code(
            "decrypt", CiphertextBlob=blob, KeyId=self._key.arn, EncryptionContext=context
        )

    def encrypt(self, context: dict[str, str]) -> str:
        return self._code(
            "encrypt", KeyId=self._key.arn, Plaintext=PLAINTEXT, EncryptionContext=context
        )

    def generate(self, context: dict[str, str]) -> str:
        return self._code(
            "generate_data_key", KeyId=self._key.arn, NumberOfBytes=32, EncryptionContext=context
        )

    def re_encrypt(self, context: dict[str, str], to: KmsKey, to_context: dict[str, str]) -> str:
        return self._code(
            "re_encrypt",
            CiphertextBlob=self._key.seal(PLAINTEXT, context),
            SourceEncryptionContext=context,
            DestinationKeyId=to.arn,
            DestinationEncryptionContext=to_context,
        )

    def administer(self) -> list[str]:
        arn = self._key.arn
        policy = self._key.policy
        return [
            self._code("get_key_policy", KeyId=arn),
            self._code("put_key_policy", KeyId=arn, Policy=policy),
            self._code("enable_key_rotation", KeyId=arn),
            self._code("disable_key", KeyId=arn),
            self._code("enable_key", KeyId=arn),
            self._code("schedule_key_deletion", KeyId=arn),
            self._code("cancel_key_deletion", KeyId=arn),
            self._code("enable_key", KeyId=arn),
        ]


OTHERS: list[dict[str, str]] = [
    {},
    {**CONTEXT, "kmsfs:volume": "mail"},
    {**CONTEXT, "service": "other"},
    {name: value for name, value in CONTEXT.items() if name != "service"},
]
"""Contexts that are not this volume's."""


def test_reader_decrypts_and_nothing_else(
    strict_kms: StrictKms, key: KmsKey, roles: KeyRoles
) -> None:
    reader = Caller(strict_kms, key, roles.reader)
    assert reader.decrypt(CONTEXT) == ""
    assert reader.encrypt(CONTEXT) == reader.generate(CONTEXT) == DENIED
    assert reader.re_encrypt(CONTEXT, key, CONTEXT) == DENIED
    assert set(reader.administer()) == {DENIED}


def test_writer_encrypts_and_nothing_else(
    strict_kms: StrictKms, key: KmsKey, roles: KeyRoles
) -> None:
    writer = Caller(strict_kms, key, roles.writer)
    assert writer.encrypt(CONTEXT) == writer.generate(CONTEXT) == ""
    assert writer.decrypt(CONTEXT) == DENIED
    assert set(writer.administer()) == {DENIED}


@pytest.mark.parametrize("context", OTHERS)
def test_other_context_is_denied_to_readers_and_writers(
    strict_kms: StrictKms, key: KmsKey, roles: KeyRoles, context: dict[str, str]
) -> None:
    writer = Caller(strict_kms, key, roles.writer)
    assert Caller(strict_kms, key, roles.reader).decrypt(context) == DENIED
    assert writer.encrypt(context) == writer.generate(context) == DENIED
    assert writer.re_encrypt(context, key, CONTEXT) == DENIED
    assert writer.re_encrypt(CONTEXT, key, context) == DENIED


def test_writer_cannot_read_by_way_of_a_key_of_its_own(
    strict_kms: StrictKms, key: KmsKey, roles: KeyRoles
) -> None:
    everything = {
        "Effect": "Allow",
        "Principal": {"AWS": arn_of(roles.writer)},
        "Action": "kms:*",
        "Resource": "*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    own = strict_kms.create_key(policy=policy)
    writer = Caller(strict_kms, key, roles.writer)
    assert writer.re_encrypt(CONTEXT, own, CONTEXT) == DENIED
    assert writer.re_encrypt(CONTEXT, key, {**CONTEXT, "kmsfs:version": "2"}) == ""


@pytest.mark.parametrize("context", [CONTEXT, *OTHERS])
def test_admin_uses_the_key_in_any_context_and_administers_it(
    strict_kms: StrictKms, key: KmsKey, roles: KeyRoles, context: dict[str, str]
) -> None:
    admin = Caller(strict_kms, key, roles.admin)
    assert admin.decrypt(context) == admin.encrypt(context) == admin.generate(context) == ""
    assert admin.re_encrypt(context, key, {}) == ""
    assert set(admin.administer()) == {""}


def test_account_administers_and_does_not_use_the_key(strict_kms: StrictKms, key: KmsKey) -> None:
    """The stand-in's own admin has IAM policies that allow it everything."""
    account = Caller(strict_kms, key, strict_kms.admin)
    assert set(account.administer()) == {""}
    assert account.decrypt(CONTEXT) == account.encrypt(CONTEXT) == account.generate(CONTEXT)
    assert account.decrypt(CONTEXT) == account.re_encrypt(CONTEXT, key, CONTEXT) == DENIED


def test_nobody_else_does_anything(strict_kms: StrictKms, key: KmsKey, roles: KeyRoles) -> None:
    nobody = Caller(strict_kms, key, roles.nobody)
    assert nobody.decrypt(CONTEXT) == nobody.encrypt(CONTEXT) == DENIED
    assert set(nobody.administer()) == {DENIED}


def test_account_is_never_locked_out(strict_kms: StrictKms) -> None:
    """Whoever is named, and whoever of them is gone later."""
    alone = key_policy(HERE, Principals(), PAIRS, multi_region=False)
    assert strict_kms.client().create_key(Policy=policy_text(alone))
    first = alone["Statement"][0]
    assert first["Principal"] == {"AWS": [f"arn:aws:iam::{ACCOUNT}:root"]}
    assert "kms:Put*" in first["Action"]
    assert "Condition" not in first


@pytest.mark.parametrize("multi_region", [False, True])
def test_no_policy_has_a_wildcard_over_use_nor_grants(roles: KeyRoles, multi_region: bool) -> None:
    policies = iam_policies([key_name(KEY)], PAIRS).values()
    for policy in (policy_for(roles, multi_region=multi_region), *policies):
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Allow"
            assert not {"kms:*", "kms:Create*", "kms:CreateGrant"} & set(statement["Action"])
    actions = policy_for(roles, multi_region=multi_region)["Statement"][0]["Action"]
    assert ("kms:ReplicateKey" in actions) == multi_region


def test_statements_are_these(roles: KeyRoles) -> None:
    statements = {each["Sid"]: each for each in policy_for(roles)["Statement"]}
    bound = {
        "kms:EncryptionContext:kmsfs:volume": "web",
        "kms:EncryptionContext:service": "shop",
    }
    assert list(statements) == [
        "AccountAdministers",
        "AdminsAdminister",
        "AdminsUse",
        "WritersEncrypt",
        "WritersReEncryptInPlace",
        "ReadersDecrypt",
    ]
    assert statements["ReadersDecrypt"] == {
        "Sid": "ReadersDecrypt",
        "Effect": "Allow",
        "Principal": {"AWS": [arn_of(roles.reader)]},
        "Action": ["kms:Decrypt"],
        "Resource": "*",
        "Condition": {"StringEquals": bound},
    }
    assert statements["WritersReEncryptInPlace"]["Condition"] == {
        "StringEquals": bound,
        "Bool": {"kms:ReEncryptOnSameKey": "true"},
    }


def test_iam_policies_name_the_keys(roles: KeyRoles) -> None:
    replica = f"arn:aws:kms:eu-west-1:{ACCOUNT}:key/mrk-1234abcd12ab34cd56ef1234567890ab"
    found = iam_policies([key_name(KEY), key_name(replica)], PAIRS)
    everywhere = replica.replace("eu-west-1", "*")
    (reading,) = found["reader"]["Statement"]
    assert reading["Resource"] == [KEY, everywhere]
    assert reading["Action"] == ["kms:Decrypt"]
    assert reading["Condition"]["StringEquals"]["kms:EncryptionContext:kmsfs:volume"] == "web"
    assert [s["Sid"] for s in found["writer"]["Statement"]] == ["Encrypt", "ReEncryptInPlace"]
    administer = found["admin"]["Statement"][0]
    assert administer["Resource"][2:] == [
        f"arn:aws:kms:us-east-1:{ACCOUNT}:alias/*",
        f"arn:aws:kms:*:{ACCOUNT}:alias/*",
    ]
    assert "Principal" not in administer


@pytest.mark.parametrize(
    "arn",
    [
        "web",
        f"arn:aws:iam::{ACCOUNT}:root",
        f"arn:aws:iam::{ACCOUNT}:group/web",
        f"arn:aws:sts::{ACCOUNT}:assumed-role/web/session",
        f"arn:aws:iam::{ACCOUNT}:role/*",
        "*",
    ],
)
def test_principal_must_be_one_identity(arn: str) -> None:
    for principals in (Principals(readers=(arn,)), Principals(admins=(arn,))):
        with pytest.raises(UsageInvalid, match="is not the ARN of a role"):
            principals.check()


def test_users_may_only_be_admins() -> None:
    user = f"arn:aws-cn:iam::{ACCOUNT}:user/path/alice"
    Principals(admins=(user,)).check()
    with pytest.raises(UsageInvalid, match="--writer"):
        Principals(writers=(user,)).check()


@pytest.mark.parametrize(
    ("volume", "context"),
    [
        ("a/b", {}),
        ("", {}),
        ("web", {"kmsfs:volume": "mail"}),
        ("web", {"user": "${aws:username}"}),
        ("web", {"a": "b", "A": "c"}),
        ("web", {"a": "\udcff"}),
    ],
)
def test_context_that_iam_would_read_otherwise_is_refused(
    volume: str, context: dict[str, str]
) -> None:
    with pytest.raises(UsageInvalid):
        volume_pairs(volume, context)


def test_too_many_principals_are_refused() -> None:
    roles = tuple(f"arn:aws:iam::{ACCOUNT}:role/{number:064}" for number in range(400))
    with pytest.raises(UsageInvalid, match=str(MAX_POLICY_BYTES)):
        key_policy(HERE, Principals(readers=roles), PAIRS, multi_region=False)


@pytest.mark.parametrize("text", ["alias/web", KEY.replace(":key/", ":alias/"), KEY[-36:], ""])
def test_key_must_be_named_by_its_arn(text: str) -> None:
    with pytest.raises(UsageInvalid, match="is not the ARN of a key"):
        key_name(text)


def test_policy_is_ascii_whatever_the_context() -> None:
    policy = key_policy(HERE, Principals(), volume_pairs("web", {"ä": "ü€"}), multi_region=False)
    assert policy_text(policy).isascii()
