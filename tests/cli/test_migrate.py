"""`kmsfs migrate`: unbound files become bound ones, and are served all the while."""

import base64
import os
import signal
import tomllib
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume, context_of, key_of, names_below
from tests.cli.conftest import Commands
from tests.support.strict_kms import StrictKms


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


def unbound(volume: BulkVolume) -> list[str]:
    found: list[str] = tomllib.loads((volume.root / "kmsfs.toml").read_text())["volume"]["unbound"]
    return found


def test_bare_blobs_become_bound_and_leave_the_list(volume: BulkVolume) -> None:
    volume.configure("legacy/*", "text", more='encryption_context = { service = "web" }\n')
    volume.encrypt("a")
    before = volume.path("a").read_bytes()
    paths = [
        volume.blob("legacy/a", service="web"),
        volume.blob("legacy/b", volume.other, service="web"),
        volume.blob("text", service="web"),
    ]
    paths[2].write_bytes(base64.b64encode(paths[2].read_bytes()))
    paths[0].chmod(0o640)
    done = volume.kmsfs.good("migrate", "web")
    assert sorted(done.stdout.split()) == [
        b"web/legacy/a.kms",
        b"web/legacy/b.kms",
        b"web/text.kms",
    ]
    toml = volume.root / "kmsfs.toml"
    assert done.lines == [
        "kmsfs: 3 files bound, 2 skipped (1 bound before, 1 kmsfs.toml)",
        f"kmsfs: 'legacy/*' is taken out of unbound in {toml}",
        f"kmsfs: 'text' is taken out of unbound in {toml}",
    ]
    for path, name in zip(paths, ("legacy/a", "legacy/b", "text"), strict=True):
        context = context_of(path)
        assert (context["kmsfs:volume"], context["kmsfs:path"]) == ("web", name)
        assert context["service"] == "web"
        assert key_of(path) == volume.key.arn
    assert paths[0].stat().st_mode & 0o777 == 0o640
    assert volume.path("a").read_bytes() == before
    assert unbound(volume) == []
    volume.check("a", "legacy/a", "legacy/b", "text")


def test_comments_and_other_patterns_of_the_configuration_stay(volume: BulkVolume) -> None:
    volume.blob("a")
    volume.blob("kept/b")
    toml = volume.root / "kmsfs.toml"
    text = f"""\
# The web servers' volume.
[volume]
name = "web"  # its name
# Until all are moved.
unbound = [
    # certificates
    "a",  # the first
    "kept/*",
]

[kms]
# Rotated each May.
key_ids = ["{volume.key.arn}"]
"""
    toml.write_text(text)
    toml.chmod(0o640)
    (volume.root / "kept" / "b.kms").write_bytes(b"\x01\x02\x02\x00\x78 no blob")
    done = volume.kmsfs("migrate", "web")
    assert done.status == 1
    assert toml.read_text() == text.replace('    "a",  # the first\n', "")
    assert toml.stat().st_mode & 0o777 == 0o640


def test_unbound_message_keeps_its_pairs(volume: BulkVolume) -> None:
    volume.configure("a")
    volume.write_plain("a")
    volume.kmsfs.good(
        "encrypt", "plain/a", "-o", "web", "--unbound", "--encryption-context", "team=x"
    )
    volume.kmsfs.good("migrate", "web", "--key-id", volume.other.arn)
    context = context_of(volume.path("a"))
    del context["kmsfs:version"]
    assert context == {"team": "x", "kmsfs:volume": "web", "kmsfs:path": "a"}
    assert key_of(volume.path("a")) == volume.other.arn
    assert volume.decrypt(volume.path("a")) == volume.content("a")


def test_file_that_no_pattern_names_is_bound_by_force_only(volume: BulkVolume) -> None:
    volume.blob("stray")
    done = volume.kmsfs.good("migrate", "web")
    assert done.stderr == (
        "kmsfs: warning: web/stray.kms: it is bound to no place and not named under unbound, and "
        "left so\n"
        "kmsfs: hint: name it there, or add --force, if it is to be served\n"
        "kmsfs: 0 files bound, 2 skipped (1 kmsfs.toml, 1 not served)\n"
    )
    volume.kmsfs.good("migrate", "web", "--force")
    assert context_of(volume.root / "stray.kms")["kmsfs:path"] == "stray"


def test_dry_run_tells_and_changes_nothing(volume: BulkVolume) -> None:
    volume.configure("*")
    blob = volume.blob("a")
    before = blob.read_bytes()
    done = volume.kmsfs.good("migrate", "web", "--dry-run")
    assert done.stdout == b"web/a.kms\n"
    assert done.lines == ["kmsfs: 1 file to be bound, 1 skipped (1 kmsfs.toml)"]
    assert (blob.read_bytes(), unbound(volume), volume.operations()) == (before, ["*"], [])


def test_directory_of_a_volume_is_taken_alone(volume: BulkVolume) -> None:
    volume.configure("**")
    volume.blob("in/a")
    outside = volume.blob("b")
    before = outside.read_bytes()
    volume.kmsfs.directory = volume.root / "in"
    done = volume.kmsfs.good("migrate")
    assert done.lines == ["kmsfs: 1 file bound"]
    assert outside.read_bytes() == before
    assert unbound(volume) == ["**"]


def test_volume_within_is_left_alone(volume: BulkVolume) -> None:
    volume.configure("**")
    blob = volume.blob("inner/a")
    (blob.parent / "kmsfs.toml").write_text('[volume]\nname = "inner"\nunbound = ["a"]\n')
    before = blob.read_bytes()
    done = volume.kmsfs.good("migrate", "web")
    assert "1 of another volume" in done.lines[0]
    assert blob.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["plain"], "no kmsfs.toml lies in or above plain"),
        (["missing"], "missing is not a directory"),
    ],
)
def test_wrong_usage_is_refused(volume: BulkVolume, arguments: list[str], error: str) -> None:
    volume.write_plain("a")
    done = volume.kmsfs("migrate", *arguments)
    assert (done.status, done.lines[0]) == (2, f"kmsfs: error: {error}")


def test_key_that_the_volume_does_not_allow_is_refused(volume: BulkVolume) -> None:
    volume.configure("a")
    blob = volume.blob("a")
    before = blob.read_bytes()
    stranger = volume.kms.create_key()
    done = volume.kmsfs("migrate", "web", "--key-id", stranger.key_id)
    assert done.status == 1
    assert done.lines[0] == (
        f"kmsfs: error: web/a.kms: volume 'web' does not allow the key {stranger.arn}"
    )
    assert (blob.read_bytes(), unbound(volume)) == (before, ["a"])


@pytest.mark.parametrize("operation", ["Decrypt", "GenerateDataKey"])
def test_failure_of_kms_changes_nothing(volume: BulkVolume, operation: str) -> None:
    volume.configure("a")
    blob = volume.blob("a")
    before = blob.read_bytes()
    volume.kms.deny(volume.kms.admin, operation)
    assert volume.kmsfs("migrate", "web").status == 1
    assert (blob.read_bytes(), unbound(volume)) == (before, ["a"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_every_file_servable_and_is_gone_on_with(
    volume: BulkVolume, number: signal.Signals
) -> None:
    names = [f"legacy/{n:03}" for n in range(100)]
    volume.configure("legacy/*")
    for name in names:
        volume.blob(name)
    volume.kms.latency_s = 0.02
    done = volume.interrupted(number, lambda: len(volume.kms.calls()) > 60, "migrate", "web")
    assert done.status != 0
    volume.kms.heal()
    assert unbound(volume) == ["legacy/*"]
    assert names_below(volume.root / "legacy") >= {f"{n:03}.kms" for n in range(100)}
    volume.check(*names)
    done = volume.kmsfs.good("migrate", "web")
    assert done.lines[-1].startswith("kmsfs: 'legacy/*' is taken out of unbound")
    assert unbound(volume) == []
    volume.check(*names)


def test_configuration_that_is_a_link_is_left_to_its_owner(volume: BulkVolume) -> None:
    volume.configure("a")
    volume.blob("a")
    toml = volume.root / "kmsfs.toml"
    elsewhere = volume.root.parent / "elsewhere.toml"
    toml.rename(elsewhere)
    toml.symlink_to(Path("..") / elsewhere.name)
    done = volume.kmsfs("migrate", "web")
    assert done.status == 1
    assert os.path.islink(toml)
    assert done.lines[-2].endswith("it is a symbolic link")
    assert context_of(volume.root / "a.kms")["kmsfs:path"] == "a"
