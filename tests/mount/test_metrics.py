"""`kmsfs status --metrics` of several mounts, of dead ones, and of some with odd names."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.metrics import Exposition
from tests.support.mounts import MountedVolume, wait_gone, wait_until
from tests.support.sites import Site, StrictSite


@pytest.fixture
def volume(site: Site) -> MountedVolume:
    """A mount whose daemon is not replaced."""
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    return site.mount("--no-restart")


def kill_daemon(volume: MountedVolume) -> None:
    """End it at once, and wait until nobody answers for the mount."""
    pid, launcher = volume.status()["daemon_pid"], volume.launcher_pid
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    wait_gone(launcher)


def test_all_mounts_are_there_and_a_dead_one_is_not_up(
    site: Site, volume: MountedVolume, tmp_path: Path
) -> None:
    other = site.mount(path=tmp_path / "other")
    both = Exposition.of(volume.kmsfs("status", "--metrics", exit_code=None).output)
    for mount in (volume, other):
        assert both.value("kmsfs_up", mountpoint=str(mount.path), view="fuse") == 1
        assert both.value("kmsfs_files_served", mountpoint=str(mount.path), volume="web") == 1
    assert len(set(both.series)) == len(both.series)

    kill_daemon(volume)

    done = volume.kmsfs("status", "--metrics", exit_code=1)
    assert f"kmsfs: error: {volume.path}: the mount does not answer" in done.stderr
    left = Exposition.of(done.output)
    assert left.value("kmsfs_up", mountpoint=str(volume.path), view="fuse") == 0
    assert left.value("kmsfs_files_served", mountpoint=str(volume.path)) is None
    assert left.value("kmsfs_up", mountpoint=str(other.path), view="fuse") == 1


def test_a_dead_mount_that_is_asked_for_is_a_sample_and_an_error(volume: MountedVolume) -> None:
    kill_daemon(volume)
    done = volume.kmsfs("status", "--metrics", volume.path, exit_code=7)
    found = Exposition.of(done.output)
    assert found.series == [
        ("kmsfs_up", (("mountpoint", str(volume.path)), ("view", "fuse"))),
    ]
    assert found.value("kmsfs_up") == 0


def test_an_open_that_is_served_stale_counts_as_that(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 1.5\n[cache]\nttl_s = 0.1\nstale_s = 600\n")
    content = site.secret("key", 40)
    site.encrypt("key", content)
    volume = site.mount()
    assert (volume.path / "key").read_bytes() == content
    site.kms.fail("KMSInternalException")
    wait_until(lambda: volume.status()["stale_count"] == 1, "its time is over")
    assert (volume.path / "key").read_bytes() == content
    found = Exposition.of(volume.kmsfs("status", "--metrics", volume.path).output)
    assert found.value("kmsfs_opens_stale_total") == 1
    assert found.value("kmsfs_opens_from_memory_total") == 0
    assert found.value("kmsfs_opens_after_decryption_total") == 1
    assert "kmsfs_decryptions_failed_total" in {name for name, _ in found.series}


def test_counters_begin_anew_with_a_new_daemon(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    volume = site.mount()

    def opens() -> float | None:
        text = volume.kmsfs("status", "--metrics", volume.path).output
        return Exposition.of(text).value("kmsfs_opens_after_decryption_total")

    assert len((volume.path / "key").read_bytes()) == 40
    assert opens() == 1
    old_pid = volume.status()["daemon_pid"]
    os.kill(old_pid, signal.SIGKILL)
    wait_gone(old_pid)
    wait_until(lambda: answers_anew(volume, old_pid), "a new daemon answers")
    assert opens() == 0


def answers_anew(volume: MountedVolume, old_pid: int) -> bool:
    """Whether another daemon answers for a mount than before."""
    done = volume.kmsfs("status", "--json", volume.path, exit_code=None)
    return done.exit_code == 0 and f'"daemon_pid": {old_pid},' not in done.output


def test_a_mountpoint_of_an_odd_name_is_read_back_as_it_is(site: Site) -> None:
    site.make_volume()
    path = site.directory / 'a "quoted"\nname\\n{}'
    volume = site.mount(path=path)
    found = Exposition.of(volume.kmsfs("status", "--metrics", path).output)
    assert found.value("kmsfs_up", mountpoint=str(path)) == 1
    assert found.value("kmsfs_locked", mountpoint=str(path), volume="web", view="fuse") == 0


def test_what_is_not_mounted_is_a_clear_error(volume: MountedVolume, tmp_path: Path) -> None:
    done = volume.kmsfs("status", "--metrics", tmp_path, exit_code=7)
    assert done.stderr == f"kmsfs: error: nothing of kmsfs is mounted at {tmp_path}\n"
    assert done.output == ""
