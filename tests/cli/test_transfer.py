"""`kmsfs mv` and `kmsfs cp`: the binding goes along, and nothing is lost on the way."""

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume, context_of, key_of, names_below
from tests.cli.conftest import Commands
from tests.support.strict_kms import StrictKms


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


@pytest.fixture
def second(volume: BulkVolume) -> Path:
    """Another volume, under the second key alone, with a pair of its own."""
    root = volume.root.parent / "second"
    root.mkdir()
    (root / "kmsfs.toml").write_text(
        f'[volume]\nname = "second"\n[kms]\nkey_ids = ["{volume.other.arn}"]\n'
        'encryption_context = { service = "second" }\n'
    )
    return root


@pytest.mark.parametrize("command", ["mv", "cp"])
def test_file_is_bound_to_its_new_place_within_a_volume(volume: BulkVolume, command: str) -> None:
    volume.encrypt("a")
    source, target = volume.path("a"), volume.path("db/b")
    source.chmod(0o640)
    version = int(context_of(source)["kmsfs:version"])
    done = volume.kmsfs.good(command, "web/a.encrypted", "web/db/b.encrypted")
    assert (done.stdout, done.stderr) == (b"web/db/b.encrypted\n", "")
    assert context_of(target)["kmsfs:path"] == "db/b"
    assert int(context_of(target)["kmsfs:version"]) > version
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert volume.decrypt(target) == volume.content("a")
    assert source.exists() == (command == "cp")


def test_target_directory_gets_the_same_name(volume: BulkVolume) -> None:
    volume.encrypt("a", "b", "db/c")
    done = volume.kmsfs.good("mv", "web/a.encrypted", "web/b.encrypted", "web/db")
    assert done.lines == ["kmsfs: 2 files moved"]
    assert names_below(volume.root) == {
        "kmsfs.toml", "db/a.encrypted", "db/b.encrypted", "db/c.encrypted",
    }  # fmt: skip
    assert volume.decrypt(volume.path("db/a")) == volume.content("a")


@pytest.mark.parametrize("command", ["mv", "cp"])
def test_another_volume_has_its_own_key_and_pairs(
    volume: BulkVolume, second: Path, command: str
) -> None:
    volume.configure(more='encryption_context = { service = "web", stage = "live" }\n')
    volume.encrypt("a")
    volume.kmsfs.good(command, volume.path("a"), second)
    target = second / "a.encrypted"
    context = context_of(target)
    del context["kmsfs:version"]
    assert context == {"kmsfs:volume": "second", "kmsfs:path": "a", "service": "second"}
    assert key_of(target) == volume.other.arn
    assert volume.decrypt(target) == volume.content("a")


def test_existing_target_needs_force_and_its_version_rises(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    done = volume.kmsfs("mv", volume.path("a"), volume.path("b"))
    assert done.status == 2
    assert done.lines == [
        f"kmsfs: error: {volume.path('a')}: {volume.path('b')} exists already",
        "kmsfs: hint: add --force to replace it",
    ]
    assert volume.decrypt(volume.path("a")) == volume.content("a")
    version = int(context_of(volume.path("b"))["kmsfs:version"])
    volume.kmsfs.good("mv", volume.path("a"), volume.path("b"), "--force")
    assert int(context_of(volume.path("b"))["kmsfs:version"]) > version
    assert volume.decrypt(volume.path("b")) == volume.content("a")
    assert not volume.path("a").exists()


def test_unbound_file_goes_as_it_is_and_kms_is_not_asked(volume: BulkVolume, second: Path) -> None:
    volume.configure("*")
    content = volume.blob("old").read_bytes()
    done = volume.kmsfs.good("mv", "web/old.kms", "web/older.kms")
    assert done.stderr == ""
    done = volume.kmsfs.good("cp", "web/older.kms", "second")
    assert done.stderr == (
        "kmsfs: warning: second/older.kms: it is bound to no place, so volume 'second' does not "
        "serve it\n"
        "kmsfs: hint: bind it with `kmsfs migrate --force`, or name it under unbound\n"
    )
    assert (volume.root / "older.kms").read_bytes() == content
    assert (second / "older.kms").read_bytes() == content
    assert not (volume.root / "old.kms").exists()
    assert volume.operations() == []


def test_directory_is_moved_with_all_below(volume: BulkVolume) -> None:
    names = [f"db/{n % 3}/{n}" for n in range(12)]
    volume.encrypt(*names)
    done = volume.kmsfs.good("mv", "web/db", "web/data")
    assert done.lines == ["kmsfs: 12 files moved"]
    assert not (volume.root / "db").exists()
    for name in names:
        path = volume.path(name.replace("db/", "data/"))
        assert volume.content(name) == volume.decrypt(path) if name in names[:3] else path.exists()


def test_directory_is_copied_with_r_only(volume: BulkVolume) -> None:
    volume.encrypt("db/a", "db/main/b")
    (volume.root / "copy").mkdir()
    done = volume.kmsfs("cp", "web/db", "web/copy")
    assert (done.status, done.lines) == (
        2,
        ["kmsfs: error: web/db is a directory", "kmsfs: hint: add -r to copy all below it"],
    )
    volume.kmsfs.good("cp", "-r", "web/db", "web/copy")
    assert volume.decrypt(volume.path("copy/db/main/b")) == volume.content("db/main/b")
    assert volume.decrypt(volume.path("db/a")) == volume.content("db/a")


def test_what_cannot_be_moved_stays_and_is_named(volume: BulkVolume) -> None:
    volume.encrypt("db/a", "db/b")
    (volume.root / "db" / "notes").write_bytes(b"not secret")
    volume.path("db/b").rename(volume.path("db/c"))
    done = volume.kmsfs("mv", "web/db", "web/data")
    assert done.status == 1
    assert sorted(line for line in done.lines if ": error: " in line) == [
        "kmsfs: error: web/db/c.encrypted: bound to path 'db/b', but lies at 'db/c'",
        "kmsfs: error: web/db/notes: it is no ciphertext",
    ]
    assert done.lines[-1] == "kmsfs: warning: web/db is left, with what could not be moved"
    assert names_below(volume.root) == {
        "kmsfs.toml", "data/a.encrypted", "db/c.encrypted", "db/notes",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["web/a.encrypted", "web/a.encrypted"], "web/a.encrypted and web/a.encrypted are the "),
        (["web/a.encrypted", "web"], "web/a.encrypted and web are the same file"),
        (["web/a.encrypted", "web/db", "web/new"], "web/new is not a directory"),
        (["web/a.encrypted", "web/new/"], "web/new/ is not a directory"),
        (["web/missing", "web/new"], "web/missing: No such file or directory"),
        (["web/db", "web/db/below"], "web/db cannot go into itself"),
        (["web", "new"], "web is a volume itself, whose files are bound within it"),
        (["web/a.encrypted", "web/db/a.encrypted", "empty"], "two of the files have one name"),
        (["web/a.encrypted", "empty"], "web/a.encrypted: no kmsfs.toml lies in or above "),
    ],
)
def test_wrong_usage_is_refused_and_changes_nothing(
    volume: BulkVolume, arguments: list[str], error: str
) -> None:
    volume.encrypt("a", "db/a")
    (volume.root.parent / "empty").mkdir()
    before = names_below(volume.root.parent)
    done = volume.kmsfs("mv", *arguments)
    assert done.status == 2
    assert done.lines[0].startswith(f"kmsfs: error: {error}")
    assert names_below(volume.root.parent) == before


@pytest.mark.parametrize("operation", ["Decrypt", "GenerateDataKey"])
def test_failure_of_kms_changes_nothing(volume: BulkVolume, operation: str) -> None:
    volume.encrypt("a")
    volume.kms.deny(volume.kms.admin, operation)
    before = volume.path("a").read_bytes()
    done = volume.kmsfs("mv", volume.path("a"), volume.path("b"))
    assert done.status == 4
    assert names_below(volume.root) == {"kmsfs.toml", "a.encrypted"}
    assert volume.path("a").read_bytes() == before


def test_copy_that_does_not_decrypt_removes_nothing(volume: BulkVolume, second: Path) -> None:
    volume.encrypt("a")
    volume.kms.deny(volume.kms.admin, "Decrypt", volume.other)
    done = volume.kmsfs("mv", volume.path("a"), second)
    assert done.status == 4
    assert names_below(second) == {"kmsfs.toml"}
    assert volume.decrypt(volume.path("a")) == volume.content("a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_move_is_gone_on_with(volume: BulkVolume, number: signal.Signals) -> None:
    names = [f"db/{n:03}" for n in range(100)]
    volume.encrypt(*names)
    volume.kms.latency_s = 0.02
    done = volume.interrupted(
        number, lambda: len(volume.kms.calls()) > 60, "mv", "web/db", "web/data"
    )
    assert done.status != 0
    if number is signal.SIGINT:
        assert done.lines[-1] == "kmsfs: hint: give the same command again with -T"
    volume.kms.heal()
    there = {path.name for path in (volume.root / "data").iterdir()}
    left = {path.name for path in (volume.root / "db").iterdir()}
    assert len(there | left) == len(names)
    # Where it was killed between the two, a file lies at both places.
    volume.kmsfs.good("mv", "-T", "--force", "web/db", "web/data")
    assert not (volume.root / "db").exists()
    out = volume.root.parent / "out"
    volume.kmsfs.good("decrypt", "-r", "web", "-o", "out", "--force")
    for name in names:
        found = out / name.replace("db/", "data/")
        assert found.read_bytes() == volume.content(name)


def test_owner_goes_along_where_a_file_is_moved(volume: BulkVolume) -> None:
    volume.encrypt("a")
    os.chown(volume.path("a"), 12, 34)
    volume.kmsfs.good("mv", volume.path("a"), volume.path("b"))
    info = volume.path("b").stat()
    assert (info.st_uid, info.st_gid) == (12, 34)
