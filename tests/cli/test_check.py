"""`kmsfs check`: a directory of ciphertext and its keys, before they are served."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Commands, Done, make_volume
from tests.support.canary import secret
from tests.support.commands import run_kmsfs
from tests.support.key_roles import KeyRoles
from tests.support.moto_kms import MotoKms
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

SECRET = secret("check", 40)
DAY_S = 86400

Change = Callable[[StrictKms, KmsKey], object]


@pytest.fixture
def kmsfs(strict_kms: StrictKms, bare_kmsfs: Commands) -> Commands:
    """kmsfs with credentials, and the strict stand-in for KMS."""
    bare_kmsfs.env |= strict_kms.env(HOME=str(bare_kmsfs.directory))
    return bare_kmsfs


@pytest.fixture
def volume(kmsfs: Commands, strict_kms: StrictKms, kms_key: KmsKey) -> Path:
    """A volume with two bound files; KMS has forgotten how they came to be."""
    root = make_volume(kmsfs, kms_key.arn)
    (root / "db").mkdir()
    for name in ("db/password", "token"):
        kmsfs.good("encrypt", "-", "--path", name, stdin=SECRET)
    strict_kms.forget_calls()
    return root


def operations(kms: StrictKms) -> list[tuple[str, str | None]]:
    return [(call.operation, call.error) for call in kms.calls()]


def shown(done: Done) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def allow_unbound(volume: Path, *patterns: str) -> None:
    path = volume / "kmsfs.toml"
    path.write_text(path.read_text().replace("unbound = []", f"unbound = {json.dumps(patterns)}"))


# --- all is well -------------------------------------------------------------------------------


def test_each_key_is_asked_once_whether_it_would_decrypt(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    done = kmsfs.good("check")
    assert done.stderr == ""
    assert done.stdout.decode().splitlines() == [
        f"key {kms_key.arn}: would decrypt",
        "db/password: good, encryption-sdk, bound, 40 bytes, 0 h old",
        "token: good, encryption-sdk, bound, 40 bytes, 0 h old",
        "2 files, 1 key: all good",
    ]
    assert operations(strict_kms) == [("Decrypt", "DryRunOperationException")]
    assert strict_kms.calls()[0].context["kmsfs:volume"] == "web"


def test_everything_is_decrypted_where_that_was_asked_for(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    done = kmsfs.good("check", volume / "db", "--decrypt")
    assert done.stderr == ""
    assert done.stdout.decode().splitlines() == [
        f"key {kms_key.arn}: decrypts",
        "password: decrypted, encryption-sdk, bound, 40 bytes, 0 h old",
        "1 file, 1 key: all good",
    ]
    assert operations(strict_kms) == [("Decrypt", None)]


def test_json_tells_everything(kmsfs: Commands, volume: Path, kms_key: KmsKey) -> None:
    (volume / "README").write_text("not ciphertext")
    found = shown(kmsfs.good("check", "--json"))
    files = found.pop("files")
    assert found == {
        "good": True,
        "source": str(volume),
        "volume": "web",
        "decrypted": False,
        "keys": [{"key_id": kms_key.arn, "files": 2, "problem": None}],
        "ignored": [{"path": "README", "reason": "of no known format"}],
        "content": None,
    }
    assert 0 <= files[0].pop("age_s") < 60
    assert files[0] == {
        "path": "db/password",
        "source_path": "db/password.encrypted",
        "format": "encryption-sdk",
        "binding": "bound",
        "size_bytes": 40,
        "size_exact": True,
        "keys": [kms_key.arn],
        "problem": None,
    }


def test_key_without_files_is_asked_about_permission_alone(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    shutil.rmtree(volume / "db")
    (volume / "token.encrypted").unlink()
    done = kmsfs("check")
    assert done.status == 0
    assert done.lines == [f"kmsfs: warning: {volume} has no file to serve"]
    (call,) = strict_kms.calls()
    assert (call.key_arn, call.error) == (kms_key.arn, "DryRunOperationException")
    assert call.context == {"kmsfs:volume": "web"}


def test_directory_without_a_volume_is_checked_under_the_keys_named(
    kmsfs: Commands, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    (kmsfs.directory / "a.kms").write_bytes(kms_key.seal(SECRET, {"a": "b"}))
    done = kmsfs("check", "--key-id", "alias/test", "--encryption-context", "a=b")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.decode().splitlines() == [
        "key alias/test: would decrypt",
        "a: good, kms-blob, unbound, about 40 bytes, 0 h old",
        "1 file, 1 key: all good",
    ]
    done = kmsfs("check", "--any-key", "--decrypt", "--encryption-context", "a=b")
    assert done.stdout.decode().splitlines()[-1] == "1 file, 0 keys: all good"


def test_bare_blobs_of_several_keys_are_each_asked_about(
    kmsfs: Commands, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other, third = strict_kms.create_key(), strict_kms.create_key()
    for number, key in enumerate((kms_key, other, third)):
        (kmsfs.directory / f"{number}.kms").write_bytes(key.seal(SECRET, {}))
    done = kmsfs("check", "--key-id", kms_key.arn, "--key-id", other.arn)
    assert done.status == 1
    assert done.lines == [
        f"kmsfs: error: 2: none of the allowed keys encrypted it: {kms_key.arn}, {other.arn}",
        "kmsfs: hint: name the key that encrypted it with --key-id",
    ]


def test_reader_may_check(kmsfs: Commands, strict_kms: StrictKms) -> None:
    """Neither DescribeKey nor a context other than the volume's is needed."""
    roles = KeyRoles.create(strict_kms)
    kmsfs.good("key", "create", "--alias", "web", *roles.options)
    (key,) = strict_kms.keys()
    make_volume(kmsfs, key.arn)
    for identity, status in ((roles.reader, 0), (roles.writer, 1), (roles.nobody, 1)):
        commands = Commands(kmsfs.directory, kmsfs.env | strict_kms.env(identity))
        assert commands("check").status == status
    admin = Commands(kmsfs.directory, kmsfs.env | strict_kms.env(roles.admin))
    admin.good("encrypt", "-", "--path", "token", stdin=SECRET)
    for arguments in ([], ["--decrypt"]):
        for identity, status in ((roles.reader, 0), (roles.writer, 1), (roles.nobody, 1)):
            commands = Commands(kmsfs.directory, kmsfs.env | strict_kms.env(identity))
            assert commands("check", *arguments).status == status


# --- something is not --------------------------------------------------------------------------


def disable(kms: StrictKms, key: KmsKey) -> None:
    kms.client().disable_key(KeyId=key.arn)


def delete(kms: StrictKms, key: KmsKey) -> None:
    kms.client().schedule_key_deletion(KeyId=key.arn)


def deny(kms: StrictKms, key: KmsKey) -> None:
    kms.deny(kms.admin, "Decrypt", key)


def throttle(kms: StrictKms, key: KmsKey) -> None:
    kms.fail("ThrottlingException")


def revoke(kms: StrictKms, key: KmsKey) -> None:
    kms.remove_identity(kms.admin)


@pytest.mark.parametrize("decrypt", [[], ["--decrypt"]], ids=["ask", "decrypt"])
@pytest.mark.parametrize(
    ("change", "error", "hint"),
    [
        (disable, "KeyUnusable", "enable the key or cancel its deletion"),
        (delete, "KeyUnusable", "enable the key or cancel its deletion"),
        (deny, "KeyAccessDenied", "give this role kms:Decrypt on the key"),
        (
            throttle,
            "KmsThrottled",
            "the account's KMS request quota is used up; the next open tries again",
        ),
        (
            revoke,
            "CredentialsUnavailable",
            "renew the credentials; if they are current, check this machine's clock",
        ),
    ],
)
def test_key_that_does_not_decrypt_is_named_and_not_asked_again(
    *,
    kmsfs: Commands,
    volume: Path,
    strict_kms: StrictKms,
    kms_key: KmsKey,
    change: Change,
    error: str,
    hint: str,
    decrypt: list[str],
) -> None:
    change(strict_kms, kms_key)
    strict_kms.forget_calls()
    done = kmsfs("check", *decrypt)
    assert done.status == 1
    assert done.stdout.decode().splitlines() == [
        f"key {kms_key.arn}: {error}",
        f"db/password: {error}",
        f"token: {error}",
        "2 files, 1 key: 3 failures",
    ]
    *errors, hinted = done.lines
    abouts = [line.split(": ")[2] for line in errors]
    assert abouts == [kms_key.arn, "db/password", "token"]
    assert hinted == f"kmsfs: hint: {hint}"
    # Botocore tries throttled requests three times, and refused credentials are looked for anew.
    assert 1 <= len(strict_kms.calls("Decrypt")) <= 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "arguments", "error", "said"),
    [
        (truncate, [], "CiphertextInvalid", "the message is cut short, or bytes follow its end"),
        (alter, ["--decrypt"], "CiphertextInvalid", None),
        (
            lambda path: path.rename(path.with_name("moved.encrypted")),
            [],
            "ContextMismatch",
            "bound to path 'token', but lies at 'moved'",
        ),
        (
            lambda path: path.write_bytes(b""),
            [],
            "CiphertextInvalid",
            "the file is empty",
        ),
        (
            lambda path: shutil.copy(path, path.with_name("token.kms")),
            [],
            "NameConflict",
            None,
        ),
        (
            lambda path: os.truncate(path, 40 << 20),
            [],
            "FileTooLarge",
            "41943040 bytes of ciphertext, 16777216 are served",
        ),
        (
            lambda path: path.write_bytes(b"text" * 2000),
            [],
            "FormatUnknown",
            None,
        ),
    ],
)
def test_file_that_cannot_be_served_is_named(
    *,
    kmsfs: Commands,
    volume: Path,
    damage: Callable[[Path], object],
    arguments: list[str],
    error: str,
    said: str | None,
) -> None:
    damage(volume / "token.encrypted")
    done = kmsfs("check", *arguments, "--json")
    assert done.status == 1
    found = shown(done)
    assert found["good"] is False
    (problem,) = [file["problem"] for file in found["files"] if file["problem"] is not None]
    assert problem["error"] == error
    assert said in (None, problem["detail"])
    assert problem["hint"]
    assert [line.partition(": ")[0] for line in done.lines] == ["kmsfs", "kmsfs"]
    assert problem["detail"] in done.lines[0]


def test_what_is_called_ciphertext_and_leads_nowhere_is_named(
    kmsfs: Commands, volume: Path
) -> None:
    (volume / "link").symlink_to("nowhere")
    kmsfs.good("check")
    (volume / "link.kms").symlink_to("nowhere")
    done = kmsfs("check")
    assert done.status == 1
    assert done.lines == ["kmsfs: error: link.kms: cannot be opened: No such file or directory"]


@pytest.mark.needs_root
@pytest.mark.parametrize("name", ["token", "db"])
def test_what_cannot_be_read_is_named_whatever_it_is_called(
    kmsfs: Commands, volume: Path, name: str
) -> None:
    (volume / "token.encrypted").rename(volume / "token")
    kmsfs.good("encrypt", "-", "-o", "token", "--force", stdin=SECRET)
    (volume / name).chmod(0)
    as_anybody = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = run_kmsfs(["check"], env=kmsfs.env, cwd=volume, prefix=as_anybody, exit_code=1)
    said = "" if name == "db" else "cannot be opened: "
    assert done.stderr == f"kmsfs: error: {name}: {said}Permission denied\n"


def test_alteration_that_only_decryption_shows_is_not_seen_without_it(
    kmsfs: Commands, volume: Path
) -> None:
    alter(volume / "token.encrypted")
    kmsfs.good("check")
    assert kmsfs("check", "--decrypt").status == 1


def test_unbound_file_of_a_volume_must_be_listed(
    kmsfs: Commands, volume: Path, kms_key: KmsKey
) -> None:
    (volume / "raw.kms").write_bytes(kms_key.seal(SECRET, {}))
    done = kmsfs("check")
    assert done.status == 1
    assert done.lines == [
        "kmsfs: error: raw: a bare KMS ciphertext blob is bound to no place",
        "kmsfs: hint: encrypt it with `kmsfs encrypt`, or name it under unbound in kmsfs.toml",
    ]
    allow_unbound(volume, "raw")
    kmsfs.good("check")
    kmsfs.good("check", "--decrypt")


def test_bytes_that_only_their_name_calls_ciphertext_are_put_to_kms(
    kmsfs: Commands, volume: Path
) -> None:
    allow_unbound(volume, "text")
    (volume / "text.kms").write_text("not ciphertext")
    done = kmsfs("check")
    assert done.status == 1
    assert done.lines[0].startswith("kmsfs: error: text: Decrypt under ")
    assert "InvalidCiphertextException" in done.lines[0]


def test_size_limit_is_the_volumes(kmsfs: Commands, volume: Path) -> None:
    with (volume / "kmsfs.toml").open("a") as file:
        file.write("[cache]\nmax_file_bytes = 39\n")
    done = kmsfs("check", "db")
    assert done.lines == [
        "kmsfs: error: password: 40 bytes, 39 at most",
        "kmsfs: hint: raise max_file_bytes under [cache]",
    ]


def test_key_that_is_not_allowed_is_not_asked(
    kmsfs: Commands, volume: Path, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_key()
    path = volume / "kmsfs.toml"
    path.write_text(path.read_text().replace(kms_key.arn, other.arn))
    done = kmsfs("check", "db")
    assert done.lines[0] == f"kmsfs: error: password: encrypted under {kms_key.arn}"
    assert [call.key_arn for call in strict_kms.calls()] == [other.arn]


def test_age_is_told_by_the_version_and_else_by_the_file(
    kmsfs: Commands, volume: Path, kms_key: KmsKey
) -> None:
    allow_unbound(volume, "raw")
    raw = volume / "raw.kms"
    raw.write_bytes(kms_key.seal(SECRET, {}))
    long_ago = time.time() - 100 * DAY_S
    for path in (raw, volume / "token.encrypted"):
        os.utime(path, (long_ago, long_ago))
    kmsfs.good("check", "--max-age", "101")
    done = kmsfs("check", "--max-age", "99")
    assert done.status == 1
    assert done.lines == [
        "kmsfs: error: raw: it was encrypted 100 days ago",
        "kmsfs: hint: encrypt it again",
    ]
    assert done.stdout.decode().splitlines()[2] == "raw: TooOld"


def test_endpoint_that_decrypts_when_only_asked_is_an_error(
    bare_kmsfs: Commands, moto_kms: MotoKms
) -> None:
    """As one that knows no DryRun does; what it gave is dropped."""
    bare_kmsfs.env |= moto_kms.env(HOME=str(bare_kmsfs.directory))
    make_volume(bare_kmsfs, moto_kms.create_key())
    bare_kmsfs.good("encrypt", "-", "--path", "token", stdin=SECRET)
    done = bare_kmsfs("check")
    assert done.status == 1
    assert done.lines[1].endswith(": asked only whether it would, it decrypted")
    assert done.lines[2] == (
        "kmsfs: hint: what answers in place of KMS knows no DryRun; try --decrypt"
    )
    bare_kmsfs.good("check", "--decrypt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], ["kmsfs: error: {}/missing is not a directory"]),
        (
            [],
            [
                "kmsfs: error: no key is allowed to decrypt anything",
                (
                    "kmsfs: hint: name the keys with --key-id, or make the directory a volume: "
                    "`kmsfs init`"
                ),
            ],
        ),
        (
            ["--content"],
            [
                "kmsfs: error: . is not a mountpoint, and --content reads through a mount",
                "kmsfs: hint: mount it first: `kmsfs mount`",
            ],
        ),
        (["--expires-within", "3"], ["kmsfs: error: --expires-within needs --content"]),
        (
            ["--any-key", "--key-id", "alias/test"],
            ["kmsfs: error: --any-key and --key-id contradict each other"],
        ),
    ],
)
def test_wrong_usage(bare_kmsfs: Commands, arguments: list[str], said: list[str]) -> None:
    done = bare_kmsfs("check", *arguments)
    assert (done.status, done.stdout) == (2, b"")
    assert done.lines == [line.format(bare_kmsfs.directory) for line in said]
