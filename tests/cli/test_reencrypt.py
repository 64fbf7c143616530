"""`kmsfs reencrypt`: what changes, what stays, and what a failure or a stopped run leaves."""

import base64
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume, context_of, key_of, names_below
from tests.cli.conftest import Commands
from tests.support.strict_kms import StrictKms

NAMES = ("a.pem", "db/main/password", "db/user")


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


def contents(volume: BulkVolume) -> dict[str, bytes]:
    return {name: (volume.root / name).read_bytes() for name in names_below(volume.root)}


def test_tree_goes_to_a_new_key_and_stays_bound(volume: BulkVolume) -> None:
    volume.encrypt(*NAMES)
    before = {name: context_of(volume.path(name)) for name in NAMES}
    done = volume.kmsfs.good("reencrypt", "web", "--key-id", volume.other.arn)
    assert sorted(done.stdout.decode().split()) == [f"web/{name}.encrypted" for name in NAMES]
    assert done.lines == ["kmsfs: 3 files re-encrypted, 1 skipped (1 kmsfs.toml)"]
    # Of each file: the old data key, a new one, and the new one once more to verify it.
    assert volume.operations() == ["Decrypt"] * 6 + ["GenerateDataKey"] * 3
    for name in NAMES:
        assert key_of(volume.path(name)) == volume.other.arn
        now = context_of(volume.path(name))
        assert int(now.pop("kmsfs:version")) > int(before[name].pop("kmsfs:version"))
        assert now == before[name]
    volume.check(*NAMES)


def test_same_command_skips_what_is_under_the_key(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    volume.blob("c", volume.other)
    volume.kmsfs.good("reencrypt", volume.path("a"), "--key-id", volume.other.arn)
    before = contents(volume)
    done = volume.kmsfs.good("reencrypt", "web", "--key-id", volume.other.arn)
    assert done.lines == [
        "kmsfs: 1 file re-encrypted, 3 skipped (1 kmsfs.toml, 2 under this key before)"
    ]
    changed = {name for name, content in contents(volume).items() if content != before[name]}
    assert changed == {"b.encrypted"}


def test_without_a_key_each_file_stays_under_its_own(volume: BulkVolume) -> None:
    volume.encrypt("a")
    volume.write_plain("b")
    volume.kmsfs.good("encrypt", "plain/b", "-o", "web", "--key-id", volume.other.arn)
    volume.blob("c", volume.other)
    before = contents(volume)
    done = volume.kmsfs.good("reencrypt", "web")
    assert done.lines == ["kmsfs: 3 files re-encrypted, 1 skipped (1 kmsfs.toml)"]
    now = contents(volume)
    assert all(now[name] != before[name] for name in now if name != "kmsfs.toml")
    assert key_of(volume.path("a")) == volume.key.arn
    assert key_of(volume.path("b")) == volume.other.arn
    assert volume.other.open(now["c.kms"], {}) == volume.content("c")


def test_stopped_run_without_a_key_goes_on_by_time(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    began_at = int(time.time())
    for name, age_s in (("a", 100), ("b", -100)):
        os.utime(volume.path(name), (began_at - age_s, began_at - age_s))
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(began_at))
    done = volume.kmsfs.good("reencrypt", "web", "--written-before", since)
    assert done.stdout == b"web/a.encrypted\n"
    assert done.lines == ["kmsfs: 1 file re-encrypted, 2 skipped (1 kmsfs.toml, 1 written since)"]


def test_plaintext_of_a_bare_blob_never_leaves_kms(volume: BulkVolume) -> None:
    volume.configure("*", more='encryption_context = { service = "web" }\n')
    raw = volume.blob("raw", service="web")
    text = volume.blob("text", service="web")
    text.write_bytes(base64.b64encode(text.read_bytes()) + b"\n")
    done = volume.kmsfs.good("reencrypt", raw, text, "--key-id", volume.other.arn)
    assert done.lines == ["kmsfs: 2 files re-encrypted"]
    # The first tells IncorrectKey where the order of keys is not that of the file.
    assert set(volume.operations()) == {"ReEncrypt"}
    assert len(volume.operations()) == 4
    context = {"service": "web"}
    assert volume.other.open(raw.read_bytes(), context) == volume.content("raw")
    assert text.read_bytes().endswith(b"\n")
    assert volume.other.open(base64.b64decode(text.read_bytes()), context) == volume.content("text")


def test_dry_run_tells_and_changes_nothing(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    volume.blob("c")
    volume.kms.create_alias("alias/new", volume.other)
    before = contents(volume)
    done = volume.kmsfs.good("reencrypt", "web", "--key-id", "alias/new", "--dry-run")
    assert sorted(done.stdout.split()) == [b"web/a.encrypted", b"web/b.encrypted", b"web/c.kms"]
    assert done.lines == ["kmsfs: 3 files to be re-encrypted, 1 skipped (1 kmsfs.toml)"]
    assert contents(volume) == before
    assert set(volume.operations()) == {"DescribeKey"}


def test_permissions_owner_and_attributes_stay(volume: BulkVolume) -> None:
    volume.encrypt("a")
    path = volume.path("a")
    os.chown(path, 12, 34)
    path.chmod(0o640)
    os.setxattr(path, "user.note", b"kept")
    volume.kmsfs.good("reencrypt", path)
    info = path.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12, 34, 0o640)
    assert os.getxattr(path, "user.note") == b"kept"


def test_key_that_the_volume_does_not_allow_is_refused(volume: BulkVolume) -> None:
    volume.encrypt("a")
    before = contents(volume)
    stranger = volume.kms.create_key()
    done = volume.kmsfs("reencrypt", "web", "--key-id", stranger.key_id)
    assert (done.status, done.lines) == (
        2,
        [
            f"kmsfs: error: volume 'web' does not allow the key {stranger.arn}",
            "kmsfs: hint: add that ARN to key_ids in kmsfs.toml first",
        ],
    )
    assert contents(volume) == before


def test_unbound_message_outside_a_volume_keeps_its_pairs(volume: BulkVolume) -> None:
    (volume.root.parent / "out").mkdir()
    volume.write_plain("a")
    volume.kmsfs.good(
        "encrypt", "plain/a", "-o", "out", "--unbound", "--key-id", volume.key.arn,
        "--encryption-context", "service=web",
    )  # fmt: skip
    path = volume.root.parent / "out" / "a.encrypted"
    done = volume.kmsfs("reencrypt", path, "--key-id", volume.other.arn)
    assert done.status == 4
    assert done.lines[1] == (
        "kmsfs: hint: add --any-key to decrypt it under the key that it is under"
    )
    volume.kmsfs.good("reencrypt", path, "--key-id", volume.other.arn, "--any-key")
    assert key_of(path) == volume.other.arn
    assert context_of(path) == {"service": "web"}


@pytest.mark.parametrize("operation", ["Decrypt", "GenerateDataKey", "ReEncryptFrom"])
def test_failure_of_kms_leaves_the_old_file_whole(volume: BulkVolume, operation: str) -> None:
    volume.encrypt("a")
    volume.blob("b")
    before = contents(volume)
    volume.kms.deny(volume.kms.admin, operation)
    done = volume.kmsfs("reencrypt", "web", "--key-id", volume.other.arn)
    assert done.status == 1
    assert sum(": error: " in line for line in done.lines) == 1
    spared = "b.kms" if operation == "ReEncryptFrom" else "a.encrypted"
    assert contents(volume)[spared] == before[spared]
    assert set(contents(volume)) == set(before)


def test_new_file_that_does_not_decrypt_replaces_nothing(volume: BulkVolume) -> None:
    volume.encrypt("a")
    volume.blob("b")
    before = contents(volume)
    volume.kms.deny(volume.kms.admin, "Decrypt", volume.other)
    volume.kms.deny(volume.kms.admin, "ReEncryptFrom", volume.other)
    done = volume.kmsfs("reencrypt", "web", "--key-id", volume.other.arn)
    assert done.status == 1
    assert sum(": error: " in line for line in done.lines) == 2
    assert contents(volume) == before


def test_file_out_of_its_place_is_refused(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    volume.path("a").rename(volume.path("c"))
    for more in ([], ["--dry-run"]):
        done = volume.kmsfs("reencrypt", volume.path("c"), *more)
        assert done.status == 3
        assert done.stderr.startswith(
            f"kmsfs: error: {volume.path('c')}: bound to path 'a', but lies at 'c'\n"
            "kmsfs: hint: the file was moved, renamed or copied from elsewhere: encrypt it for "
            "this place\n"
        )


def test_what_is_no_ciphertext_fails_where_it_was_named(volume: BulkVolume) -> None:
    (volume.root / "notes").write_bytes(b"not secret")
    done = volume.kmsfs("reencrypt", "web/notes", "web/missing")
    (volume.root / "link").symlink_to("notes.encrypted")
    assert done.status == 1
    assert "kmsfs: error: web/notes: the file is of no known format" in done.lines
    assert "kmsfs: error: web/missing: No such file or directory" in done.lines
    volume.encrypt("notes")
    done = volume.kmsfs("reencrypt", "web/link")
    assert done.status == 2
    assert done.lines[0] == "kmsfs: error: web/link: it is a symbolic link"
    done = volume.kmsfs.good("reencrypt", "web")
    assert "kmsfs: 1 file re-encrypted, 2 skipped (1 kmsfs.toml, 1 no ciphertext)" in done.lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_is_gone_on_with(volume: BulkVolume, number: signal.Signals) -> None:
    names = [f"{n % 7}/{n:03}" for n in range(200)]
    volume.encrypt(*names)
    volume.kms.latency_s = 0.02
    done = volume.interrupted(
        number,
        lambda: len(volume.kms.calls()) > 120,
        "reencrypt", "web", "--key-id", volume.other.arn,
    )  # fmt: skip
    assert done.status != 0
    volume.kms.heal()
    moved = [name for name in names if key_of(volume.path(name)) == volume.other.arn]
    assert 0 < len(moved) < len(names)
    volume.check(*names)
    done = volume.kmsfs.good("reencrypt", "web", "--key-id", volume.other.arn)
    assert done.stderr == (
        f"kmsfs: {len(names) - len(moved)} files re-encrypted, {len(moved) + 1} skipped "
        f"(1 kmsfs.toml, {len(moved)} under this key before)\n"
    )
    assert {key_of(volume.path(name)) for name in names} == {volume.other.arn}
    volume.check(*names)


def test_what_a_killed_run_left_is_taken_away(volume: BulkVolume) -> None:
    volume.encrypt("a")
    left, fresh = (volume.root / f".kmsfs-{digit * 16}" for digit in "01")
    for path in (left, fresh):
        path.write_bytes(volume.path("a").read_bytes())
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    volume.kmsfs.good("reencrypt", "web")
    assert names_below(volume.root) == {"kmsfs.toml", "a.encrypted", fresh.name}


def test_file_that_is_replaced_meanwhile_is_left_to_whoever_did(
    volume: BulkVolume, tmp_path: Path
) -> None:
    volume.encrypt("a")
    path = volume.path("a")
    volume.kms.latency_s = 0.3
    process = volume.start("reencrypt", path)
    volume.kms.wait_for_calls(1, timeout_s=60)
    newer = path.read_bytes()
    other = path.with_name("b")
    other.write_bytes(newer)
    other.rename(path)
    inode = path.stat().st_ino
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert stderr.decode().splitlines()[0] == (
        f"kmsfs: error: {path}: it was changed by somebody else meanwhile"
    )
    assert (path.stat().st_ino, path.read_bytes()) == (inode, newer)
