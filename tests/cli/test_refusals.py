"""What KMS refuses or fails at, in the words and with the status that a user gets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import Commands, make_volume
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

SECRET = b"correct horse battery staple\n"

Change = Callable[[StrictKms, KmsKey], object]


@pytest.fixture
def kmsfs(strict_kms: StrictKms, bare_kmsfs: Commands) -> Commands:
    """kmsfs with credentials, and the strict stand-in for KMS."""
    bare_kmsfs.env |= strict_kms.env(HOME=str(bare_kmsfs.directory))
    return bare_kmsfs


@pytest.fixture
def volume(kmsfs: Commands, kms_key: KmsKey) -> Path:
    """A volume with one bound file and one bare blob."""
    root = make_volume(kmsfs, kms_key.arn)
    kmsfs.good("encrypt", "-", "--path", "bound", stdin=SECRET)
    kmsfs.good("encrypt", "-", "--raw", "-o", "raw.kms", stdin=SECRET)
    return root


def disable(kms: StrictKms, key: KmsKey) -> None:
    kms.client().disable_key(KeyId=key.arn)


def delete(kms: StrictKms, key: KmsKey) -> None:
    kms.client().schedule_key_deletion(KeyId=key.arn)


def deny(kms: StrictKms, key: KmsKey) -> None:
    kms.deny(kms.admin, "*", key)


def throttle(kms: StrictKms, key: KmsKey) -> None:
    kms.fail("ThrottlingException")


def revoke(kms: StrictKms, key: KmsKey) -> None:
    kms.remove_identity(kms.admin)


@dataclass(frozen=True)
class Refusal:
    """What is done to KMS, and what a command says then."""

    change: Change
    status: int
    hint: str


REFUSALS = [
    Refusal(disable, 4, "enable the key or cancel its deletion"),
    Refusal(delete, 4, "enable the key or cancel its deletion"),
    Refusal(deny, 4, "give this role kms:Decrypt on the key"),
    Refusal(throttle, 5, "the account's KMS request quota is used up; the next open tries again"),
    Refusal(revoke, 5, "renew the credentials; if they are current, check this machine's clock"),
]
refusals = pytest.mark.parametrize("refusal", REFUSALS, ids=lambda it: it.change.__name__)


@refusals
def test_refusal_to_decrypt_has_its_status_and_hint_and_releases_nothing(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey, refusal: Refusal
) -> None:
    refusal.change(strict_kms, kms_key)
    for name in ("bound.encrypted", "raw.kms"):
        done = kmsfs("decrypt", name, "-o", "plain")
        assert done.status == refusal.status
        assert done.stdout == b""
        assert done.lines[0].startswith(f"kmsfs: error: {name}: ")
        assert done.lines[1:] == [f"kmsfs: hint: {refusal.hint}"]
        assert not (volume / "plain").exists()


@refusals
def test_refusal_to_encrypt_leaves_the_old_output(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey, refusal: Refusal
) -> None:
    before = (volume / "bound.encrypted").read_bytes()
    refusal.change(strict_kms, kms_key)
    for raw in ([], ["--raw"]):
        done = kmsfs("encrypt", "-", "-o", "bound.encrypted", "--force", *raw, stdin=b"new")
        assert done.status == refusal.status
        assert (volume / "bound.encrypted").read_bytes() == before
        assert {path.name for path in volume.iterdir()} == {
            "kmsfs.toml",
            "bound.encrypted",
            "raw.kms",
        }


def test_wrong_key_for_a_blob_is_named(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key()
    done = kmsfs("decrypt", "raw.kms", "--key-id", other.arn)
    assert done.status == 4
    assert done.lines[-2:] == [
        f"kmsfs: error: raw.kms: none of the allowed keys encrypted it: {other.arn}",
        "kmsfs: hint: name the key that encrypted it with --key-id",
    ]
    strict_kms.forget_calls()
    kmsfs.good("decrypt", "raw.kms", "--key-id", other.arn, "--key-id", kms_key.arn)
    assert [call.error for call in strict_kms.calls("Decrypt")] == ["IncorrectKeyException", None]


def test_alias_that_leads_to_another_key_does_not_decrypt(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms
) -> None:
    strict_kms.create_key(alias="alias/other")
    done = kmsfs("decrypt", "bound.encrypted", "--key-id", "alias/other")
    assert done.status == 4
    assert kmsfs.good("decrypt", "bound.encrypted", "--key-id", "alias/test").stdout == SECRET


def test_nothing_is_asked_for_what_shows_without_kms(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms
) -> None:
    (volume / "bound.encrypted").rename(volume / "moved.encrypted")
    (volume / "short.kms").write_bytes((volume / "moved.encrypted").read_bytes()[:-1])
    strict_kms.forget_calls()
    for arguments in (
        ["decrypt", "moved.encrypted"],
        ["decrypt", "short.kms"],
        ["decrypt", "moved.encrypted", "-o", "raw.kms"],
        ["encrypt", "moved.encrypted"],
        ["inspect", "moved.encrypted", "raw.kms"],
    ):
        kmsfs(*arguments)
    assert strict_kms.calls() == []


def test_other_context_for_a_blob_is_not_authentic(kmsfs: Commands, volume: Path) -> None:
    done = kmsfs("decrypt", "raw.kms", "--encryption-context", "a=b")
    assert done.status == 3
    assert done.stdout == b""
