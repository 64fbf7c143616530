"""`kmsfs refresh`: KMS is asked again, for a file, a directory or a whole mount."""

import os
from pathlib import Path

import pytest

from tests.support.commands import run_kmsfs
from tests.support.mounts import MountedVolume
from tests.support.refusals import refusal_of, said_of_refused
from tests.support.sites import StrictSite

REVOKED = "Key has been revoked"


@pytest.fixture
def volume(strict_site: StrictSite) -> MountedVolume:
    """A mount of three files, in two directories, all of which have been read."""
    site = strict_site
    site.make_volume()
    for name in ("a", "sub/b", "sub/c"):
        site.encrypt(name, site.secret(name, 300))
    volume = site.mount()
    read_all(volume)
    site.kms.forget_calls()
    return volume


def read_all(volume: MountedVolume) -> None:
    """Open every file once."""
    for name in ("a", "sub/b", "sub/c"):
        assert len((volume.path / name).read_bytes()) == 300


@pytest.mark.parametrize(("path", "calls"), [("a", 1), ("sub/b", 1), ("sub", 2), ("", 3)])
def test_kms_is_asked_again_for_what_is_at_a_path_and_nothing_else(
    strict_site: StrictSite, volume: MountedVolume, path: str, calls: int
) -> None:
    read_all(volume)
    assert strict_site.kms.calls("Decrypt") == []
    done = volume.kmsfs("refresh", volume.path / path)
    assert (done.output, done.stderr) == ("", "")
    read_all(volume)
    assert len(strict_site.kms.calls("Decrypt")) == calls


def test_without_a_path_every_mount_is_read_again(
    strict_site: StrictSite, volume: MountedVolume, tmp_path: Path
) -> None:
    other = strict_site.mount(path=tmp_path / "other")
    read_all(other)
    strict_site.kms.forget_calls()
    # Other mounts of this machine may fail; these two do not.
    done = run_kmsfs(["refresh"], env=strict_site.env, exit_code=None)
    assert str(tmp_path) not in done.stderr
    read_all(volume)
    read_all(other)
    assert len(strict_site.kms.calls("Decrypt")) == 6


def test_a_key_that_was_disabled_meanwhile_takes_the_file_away_at_once(
    strict_site: StrictSite, view: str, volume: MountedVolume
) -> None:
    strict_site.client.disable_key(KeyId=strict_site.key_arn)
    done = volume.kmsfs("refresh", volume.path / "a", exit_code={"fuse": 0, "ramfs": 1}[view])
    assert ("a: KeyUnusable: " in done.stderr) == (view == "ramfs")
    assert refusal_of(volume, "a") == (said_of_refused(view, fuse=REVOKED), "KeyUnusable")
    # What was not asked for is served for its time.
    assert len((volume.path / "sub/b").read_bytes()) == 300

    strict_site.client.enable_key(KeyId=strict_site.key_arn)
    volume.kmsfs("refresh", volume.path / "a")
    assert len((volume.path / "a").read_bytes()) == 300
    assert volume.failing() == {}


def test_what_is_open_is_readable_to_its_end(
    strict_site: StrictSite, volume: MountedVolume
) -> None:
    with (volume.path / "a").open("rb", buffering=0) as opened:
        first = opened.read(10)
        volume.kmsfs("refresh", volume.path)
        assert first + opened.read() == strict_site.secret("a", 300)
    assert (volume.path / "a").read_bytes() == strict_site.secret("a", 300)


def test_a_link_that_leads_to_the_mount_will_do(
    strict_site: StrictSite, volume: MountedVolume, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(volume.path)
    for path in (tmp_path / "link/a", os.path.realpath(volume.path / "a")):
        strict_site.kms.forget_calls()
        volume.kmsfs("refresh", path)
        read_all(volume)
        assert len(strict_site.kms.calls("Decrypt")) == 1


def test_what_cannot_be_read_again_is_a_clear_error(volume: MountedVolume, tmp_path: Path) -> None:
    done = volume.kmsfs("refresh", volume.path / "nothing", exit_code=2)
    assert "kmsfs: error: nothing is not served\n" in done.stderr
    done = volume.kmsfs("refresh", tmp_path, exit_code=7)
    assert f"kmsfs: error: {tmp_path} is in no mount of kmsfs\n" in done.stderr
    done = volume.kmsfs("refresh", "--accept-older", exit_code=2)
    assert "kmsfs: error: --accept-older needs a PATH\n" in done.stderr
    volume.kmsfs("lock", volume.path)
    done = volume.kmsfs("refresh", volume.path, exit_code=5)
    assert "kmsfs: error: the volume is locked\n" in done.stderr
