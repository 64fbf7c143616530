"""`kmsfs key`: a key with its policy, and what the roles it names can do with it then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Commands, Done, make_volume
from tests.support.canary import secret
from tests.support.key_roles import KeyRoles, arn_of
from tests.support.strict_identities import Identity
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import ACCOUNT, StrictKms

SECRET = secret("key", 40)

NO_ADMIN = (
    "kmsfs: hint: no --admin was named: nobody may edit files or change keys, since readers only "
    "decrypt and writers only encrypt"
)
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture
def kmsfs(strict_kms: StrictKms, bare_kmsfs: Commands) -> Commands:
    """kmsfs as the stand-in's admin, who has IAM policies and is named in no key policy."""
    bare_kmsfs.env |= strict_kms.env(HOME=str(bare_kmsfs.directory))
    return bare_kmsfs


@pytest.fixture
def roles(strict_kms: StrictKms) -> KeyRoles:
    return KeyRoles.create(strict_kms)


@pytest.fixture
def run_as(kmsfs: Commands, strict_kms: StrictKms) -> Callable[[Identity], Commands]:
    """The same commands with another identity's credentials."""

    def become(identity: Identity) -> Commands:
        return Commands(kmsfs.directory, kmsfs.env | strict_kms.env(identity, HOME="/nonexistent"))

    return become


def the_key(kms: StrictKms) -> KmsKey:
    (key,) = kms.keys()
    return key


def statements(kms: StrictKms) -> dict[str, dict[str, Any]]:
    text = kms.client().get_key_policy(KeyId=the_key(kms).arn)["Policy"]
    return {each["Sid"]: each for each in json.loads(text)["Statement"]}


# --- create ------------------------------------------------------------------------------------


def test_key_is_made_with_policy_rotation_and_alias(
    kmsfs: Commands, strict_kms: StrictKms, roles: KeyRoles
) -> None:
    done = kmsfs.good("key", "create", "--alias", "web", *roles.options)
    key = the_key(strict_kms)
    assert (done.stdout.decode(), done.stderr) == (f"{key.arn}\n", "")
    assert key.rotation
    assert not key.multi_region
    client = strict_kms.client()
    assert client.describe_key(KeyId="alias/web")["KeyMetadata"]["Arn"] == key.arn
    found = statements(strict_kms)
    assert found["ReadersDecrypt"]["Principal"]["AWS"] == [arn_of(roles.reader)]
    assert found["WritersEncrypt"]["Principal"]["AWS"] == [arn_of(roles.writer)]
    assert found["AdminsUse"]["Principal"]["AWS"] == [arn_of(roles.admin)]
    assert found["AccountAdministers"]["Principal"]["AWS"] == [f"arn:aws:iam::{ACCOUNT}:root"]
    assert [call.operation for call in strict_kms.calls()][:5] == [
        "GetCallerIdentity",
        "DescribeKey",
        "CreateKey",
        "EnableKeyRotation",
        "CreateAlias",
    ]


def test_roles_can_do_with_a_volume_what_they_are_for(
    kmsfs: Commands,
    strict_kms: StrictKms,
    roles: KeyRoles,
    run_as: Callable[[Identity], Commands],
) -> None:
    kmsfs.good("key", "create", "--alias", "alias/web", *roles.options)
    reader, writer, admin = (run_as(who) for who in (roles.reader, roles.writer, roles.admin))
    (kmsfs.directory / "web").mkdir()
    admin.good("init", "web", "--key-id", "alias/web")
    writer.good("encrypt", "-", "-o", "web/password.encrypted", stdin=SECRET)
    assert reader.good("decrypt", "web/password.encrypted").stdout == SECRET
    assert admin.good("decrypt", "web/password.encrypted").stdout == SECRET

    def refused(done: Done) -> bool:
        assert done.stdout == b""
        return done.status == 4 and "AccessDeniedException" in done.stderr

    assert refused(writer("decrypt", "web/password.encrypted"))
    assert refused(reader("encrypt", "-", "-o", "web/other.encrypted", stdin=SECRET))
    assert refused(run_as(roles.nobody)("decrypt", "web/password.encrypted"))
    # The same key, a volume of another name.
    (kmsfs.directory / "mail").mkdir()
    admin.good("init", "mail", "--key-id", "alias/web")
    assert refused(writer("encrypt", "-", "-o", "mail/password.encrypted", stdin=SECRET))
    admin.good("encrypt", "-", "-o", "mail/password.encrypted", stdin=SECRET)
    assert refused(reader("decrypt", "mail/password.encrypted"))


def test_bare_blobs_are_read_where_their_context_names_the_volume(
    kmsfs: Commands,
    strict_kms: StrictKms,
    roles: KeyRoles,
    run_as: Callable[[Identity], Commands],
) -> None:
    arguments = ("--alias", "web", *roles.options, "--context", "service=shop")
    kmsfs.good("key", "create", *arguments)
    root = make_volume(kmsfs, the_key(strict_kms).arn)
    with (root / "kmsfs.toml").open("a") as file:
        file.write('encryption_context = { service = "shop" }\n')
    reader, writer = run_as(roles.reader), run_as(roles.writer)
    writer.good("encrypt", "-", "-o", "bound.encrypted", stdin=SECRET)
    assert reader.good("decrypt", "bound.encrypted").stdout == SECRET
    assert writer("encrypt", "-", "--raw", "-o", "raw.kms", stdin=SECRET).status == 4
    context = {"service": "shop", "kmsfs:volume": "web"}
    blob = strict_kms.client(roles.writer).encrypt(
        KeyId="alias/web", Plaintext=SECRET, EncryptionContext=context
    )["CiphertextBlob"]
    (root / "raw.kms").write_bytes(blob)
    options = [f"--encryption-context={key}={value}" for key, value in context.items()]
    assert reader.good("decrypt", "raw.kms", *options).stdout == SECRET
    assert reader("decrypt", "raw.kms").status == 4


def test_key_of_a_user_with_no_admin_is_said_to_be_half_a_key(
    kmsfs: Commands, strict_kms: StrictKms, roles: KeyRoles
) -> None:
    done = kmsfs.good("key", "create", "--alias", "web", "--multi-region")
    assert done.lines == [NO_ADMIN]
    assert the_key(strict_kms).multi_region
    assert "kms:ReplicateKey" in statements(strict_kms)["AccountAdministers"]["Action"]


def test_volume_and_context_are_those_that_were_named(
    kmsfs: Commands, strict_kms: StrictKms, roles: KeyRoles
) -> None:
    options = ("--volume", "shop", "--context", "a=b=c", "--context", "tier=1")
    kmsfs.good("key", "create", "--alias", "team/web", *options, *roles.options)
    assert statements(strict_kms)["ReadersDecrypt"]["Condition"]["StringEquals"] == {
        "kms:EncryptionContext:kmsfs:volume": "shop",
        "kms:EncryptionContext:a": "b=c",
        "kms:EncryptionContext:tier": "1",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["kmsfs: error: Missing option '--alias'.", "hint: see `kmsfs key create --help`"]),
        (
            ["--alias", "alias/aws/web"],
            [
                "kmsfs: error: 'alias/aws/web' is not a name for a key",
                "hint: letters, digits, slash, underscore and dash; alias/aws/ is kept for AWS",
            ],
        ),
        (
            ["--alias", "team/web"],
            [
                "kmsfs: error: 'team/web' is not a volume's name",
                (
                    "hint: name it with --volume: letters, digits, dot, dash and underscore, 64 at "
                    "most"
                ),
            ],
        ),
        (
            ["--alias", "web", "--reader", f"arn:aws:iam::{ACCOUNT}:user/me"],
            [
                f"kmsfs: error: --reader 'arn:aws:iam::{ACCOUNT}:user/me' is not the ARN of a role",
                "hint: it has the form arn:aws:iam::ACCOUNT:role/NAME",
            ],
        ),
        (
            ["--alias", "web", "--admin", f"arn:aws:iam::{ACCOUNT}:root"],
            [
                (
                    f"kmsfs: error: --admin 'arn:aws:iam::{ACCOUNT}:root' is not the ARN of a "
                    "role or user"
                ),
                (
                    "hint: it has the form arn:aws:iam::ACCOUNT:role/NAME or "
                    "arn:aws:iam::ACCOUNT:user/NAME"
                ),
            ],
        ),
        (
            ["--alias", "web", "--context", "a"],
            [
                "kmsfs: error: Invalid value for '--context': 'a' is not of the form K=V.",
                "hint: see `kmsfs key create --help`",
            ],
        ),
        (
            ["--alias", "web", "--context", "kmsfs:volume=mail"],
            [
                "kmsfs: error: the encryption context key 'kmsfs:volume' is not free to be set",
                "hint: the volume is named with --volume",
            ],
        ),
        (
            ["--alias", "web", "--context", "user=${aws:username}"],
            ["kmsfs: error: IAM would take '${aws:username}' for a policy variable"],
        ),
    ],
)
def test_what_makes_no_sense_is_refused_without_asking_aws(
    kmsfs: Commands, strict_kms: StrictKms, arguments: list[str], said: list[str]
) -> None:
    done = kmsfs("key", "create", *arguments)
    assert (done.status, done.stdout) == (2, b"")
    assert [line.removeprefix("kmsfs: ") for line in done.lines] == [
        line.removeprefix("kmsfs: ") for line in said
    ]
    assert strict_kms.calls() == []


def test_alias_that_is_taken_is_refused_before_a_key_is_made(
    kmsfs: Commands, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    done = kmsfs("key", "create", "--alias", "test")
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: alias/test stands for a key already",
        "kmsfs: hint: choose another name with --alias",
    ]
    assert strict_kms.keys() == [kms_key]


def test_role_that_does_not_exist_is_refused_and_leaves_no_key(
    kmsfs: Commands, strict_kms: StrictKms
) -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/nobody"
    done = kmsfs("key", "create", "--alias", "web", "--reader", role)
    assert done.status == 4
    assert done.lines[0].startswith(
        "kmsfs: error: CreateKey under alias/web: MalformedPolicyDocumentException (request "
    )
    assert done.lines[1:] == [
        (
            "kmsfs: hint: check that every role and user named exists; a new one takes some "
            "seconds to be seen"
        )
    ]
    assert strict_kms.keys() == []


def test_nobody_makes_a_key_that_it_could_not_change_the_policy_of(
    strict_kms: StrictKms, kmsfs: Commands
) -> None:
    strict_kms.deny(strict_kms.admin, "CreateKey")
    done = kmsfs("key", "create", "--alias", "web")
    assert done.status == 4
    assert done.lines[1:] == ["kmsfs: hint: give this identity kms:CreateKey"]
    assert strict_kms.keys() == []


@pytest.mark.parametrize(
    ("operation", "rotation"), [("EnableKeyRotation", False), ("CreateAlias", True)]
)
def test_key_that_is_not_finished_is_named_with_what_is_left_to_do(
    kmsfs: Commands, strict_kms: StrictKms, operation: str, rotation: bool
) -> None:
    strict_kms.deny(strict_kms.admin, operation)
    done = kmsfs("key", "create", "--alias", "web")
    key = the_key(strict_kms)
    assert (done.status, done.stdout) == (4, b"")
    assert key.rotation == rotation
    rotate = f"aws kms enable-key-rotation --key-id {key.arn} && "
    assert done.lines[0].startswith(
        f"kmsfs: error: the key {key.arn} was made, but is not finished: {operation} under "
        "alias/web: AccessDeniedException (request "
    )
    assert done.lines[1:] == [
        (
            f"kmsfs: hint: finish it with `{'' if rotation else rotate}aws kms create-alias "
            f"--alias-name alias/web --target-key-id {key.arn}`, or delete it with `aws kms "
            f"schedule-key-deletion --key-id {key.arn}`"
        )
    ]


def test_key_that_is_not_seen_at_once_is_waited_for(kmsfs: Commands, strict_kms: StrictKms) -> None:
    strict_kms.fail("NotFoundException", times=2, operation="EnableKeyRotation")
    strict_kms.fail("NotFoundException", times=1, operation="CreateAlias")
    kmsfs.good("key", "create", "--alias", "web")
    assert the_key(strict_kms).rotation


def test_creation_is_asked_for_once_since_each_time_makes_a_key(
    kmsfs: Commands, strict_kms: StrictKms
) -> None:
    strict_kms.fail("KMSInternalException", operation="CreateKey")
    done = kmsfs("key", "create", "--alias", "web")
    assert done.status == 5
    assert len(strict_kms.calls("CreateKey")) == 1
    assert done.lines[1:] == [
        (
            "kmsfs: hint: look whether a key was made all the same (its description is 'kmsfs "
            "volume web') before you try again"
        )
    ]


def test_region_must_be_known(kmsfs: Commands) -> None:
    del kmsfs.env["AWS_DEFAULT_REGION"]
    done = kmsfs("key", "create", "--alias", "web")
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: no region is known for alias/web",
        "kmsfs: hint: name one with --region",
    ]


def test_address_of_kms_alone_is_not_enough(kmsfs: Commands, strict_kms: StrictKms) -> None:
    """The account is asked for at STS, which has an address of its own."""
    url = kmsfs.env.pop("AWS_ENDPOINT_URL")
    kmsfs.env["AWS_ENDPOINT_URL_STS"] = "http://127.0.0.1:1"
    done = kmsfs("key", "create", "--alias", "web", "--endpoint-url", url)
    assert done.status == 5
    assert done.lines[1:] == [
        "kmsfs: hint: STS is asked for the account: name its address in AWS_ENDPOINT_URL_STS"
    ]
    assert strict_kms.keys() == []
    kmsfs.env["AWS_ENDPOINT_URL_STS"] = url
    kmsfs.good("key", "create", "--alias", "web", "--endpoint-url", url)


def test_credentials_must_be_there(bare_kmsfs: Commands) -> None:
    done = bare_kmsfs("key", "create", "--alias", "web", "--region", "us-east-1")
    assert done.status == 5
    assert done.lines[0] == "kmsfs: error: no AWS credentials found"


# --- policy ------------------------------------------------------------------------------------


def test_policies_of_a_volume_are_shown_offline(bare_kmsfs: Commands) -> None:
    root = make_volume(bare_kmsfs, KEY)
    (root / "db").mkdir()
    reader = f"arn:aws:iam::{ACCOUNT}:role/web"
    done = bare_kmsfs.good("key", "policy", "db", "--reader", reader)
    assert done.stderr == ""
    shown = json.loads(done.stdout)
    assert (shown["volume"], list(shown["keys"])) == ("web", [KEY])
    assert list(shown["iam"]) == ["reader", "writer", "admin"]
    assert shown["iam"]["reader"] == {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "Decrypt",
                "Effect": "Allow",
                "Action": ["kms:Decrypt"],
                "Resource": [KEY],
                "Condition": {"StringEquals": {"kms:EncryptionContext:kmsfs:volume": "web"}},
            }
        ],
    }


def test_policy_shown_is_the_one_that_create_sets(
    kmsfs: Commands, strict_kms: StrictKms, roles: KeyRoles
) -> None:
    kmsfs.good("key", "create", "--alias", "web", *roles.options)
    key = the_key(strict_kms)
    make_volume(kmsfs, key.arn)
    strict_kms.forget_calls()
    shown = json.loads(kmsfs.good("key", "policy", *roles.options).stdout)
    assert strict_kms.calls() == []
    assert shown["keys"][key.arn] == json.loads(key.policy or "")


def test_files_that_readers_cannot_decrypt_are_named(
    kmsfs: Commands, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    root = make_volume(kmsfs, kms_key.arn)
    kmsfs.good("encrypt", "-", "--path", "bound", stdin=SECRET)
    for number in range(9):
        kmsfs.good("encrypt", "-", "--raw", "-o", f"{number}.kms", stdin=SECRET)
    done = kmsfs.good("key", "policy", root)
    assert done.lines == [
        *(
            f"kmsfs: warning: {number}.kms: its encryption context is not the volume's"
            for number in range(8)
        ),
        "kmsfs: warning: so it is with 1 other files",
        (
            "kmsfs: hint: readers cannot decrypt these under this policy: decrypt each as admin, "
            "and encrypt it again with `kmsfs encrypt`"
        ),
    ]


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (
            None,
            [
                "kmsfs: error: no kmsfs.toml lies in or above {}",
                "kmsfs: hint: make a volume with `kmsfs init`",
            ],
        ),
        (
            '[volume]\nname = "web"\n',
            [
                "kmsfs: error: volume 'web' has no key",
                "kmsfs: hint: name one under key_ids in kmsfs.toml",
            ],
        ),
        (
            '[volume]\nname = "web"\n[kms]\nkey_ids = ["alias/web"]\n',
            [
                "kmsfs: error: 'alias/web' is not the ARN of a key, so its account is not known",
                "kmsfs: hint: name the key by its ARN, as `kmsfs init` stores it",
            ],
        ),
    ],
)
def test_volume_without_key_arns_has_no_policy(
    bare_kmsfs: Commands, toml: str | None, said: list[str]
) -> None:
    directory: Path = bare_kmsfs.directory
    if toml is not None:
        (directory / "kmsfs.toml").write_text(toml)
    done = bare_kmsfs("key", "policy")
    assert (done.status, done.stdout) == (2, b"")
    assert done.lines == [line.format(directory) for line in said]
