"""Mounting, unmounting in every way, and what happens when a process of a mount dies."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmsfs.views import mountpoint as mounts
from tests.support.commands import KMSFS, run_kmsfs
from tests.support.mounts import (
    MountedVolume,
    process_name,
    processes_of,
    strerror_of_cat,
    wait_gone,
    wait_until,
)
from tests.support.sites import Site

# Mounts as the command does, once it is told to go on.
_MOUNT_WHEN_TOLD = """
import os, signal, sys
from kmsfs.launcher import launch
from kmsfs.manage.mounting import MountOptions, mount_config

def make_config():
    os.write(1, b"waiting")
    os.read(0, 1)
    return mount_config(*sys.argv[1:], MountOptions())

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(launch(make_config, foreground=False, tell=print))
"""


@pytest.fixture
def served(site: Site) -> MountedVolume:
    """A mount with one file, `key`, that has been read."""
    site.make_volume()
    site.encrypt("key", site.secret("key", 5000))
    volume = site.mount()
    assert len((volume.path / "key").read_bytes()) == 5000
    return volume


def assert_all_end(pids: list[int], volume: MountedVolume) -> None:
    for pid in pids:
        wait_gone(pid)
    assert volume.mount is None
    assert os.listdir(volume.path) == []


def test_lazy_umount_wipes_what_is_not_open_and_the_rest_at_its_last_close(site: Site) -> None:
    site.make_volume()
    content = site.secret("open", 5000)
    site.encrypt("open", content)
    site.encrypt("closed", site.secret("closed", 5000))
    volume = site.mount()
    pids = processes_of(volume.path)
    daemon_pid = volume.status()["daemon_pid"]
    (volume.path / "closed").read_bytes()
    with (volume.path / "open").open("rb") as opened:
        two_files = locked_pages(daemon_pid)
        subprocess.run(["umount", "-l", volume.path], check=True)
        wait_until(lambda: locked_pages(daemon_pid) == two_files - 2, "the closed one is wiped")
        assert opened.read() == content
    assert_all_end(pids, volume)


def test_unmounting_what_is_not_mounted_is_a_clear_error(site: Site, tmp_path: Path) -> None:
    done = run_kmsfs(["umount", tmp_path], env=site.env, exit_code=None)
    assert done.exit_code == 7
    assert done.stderr == f"kmsfs: error: nothing of kmsfs is mounted at {tmp_path}\n"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is not a directory"),
        (lambda path: (path.mkdir(), (path / "file").write_text("x")), "is not empty"),
        (lambda path: path.symlink_to("/run"), "is a symbolic link"),
    ],
    ids=["missing", "file", "not-empty", "link"],
)
def test_unusable_mountpoint_is_refused_with_what_to_do(
    site: Site, tmp_path: Path, make: object, expected: str
) -> None:
    assert callable(make)
    site.make_volume()
    mountpoint = tmp_path / "target"
    make(mountpoint)
    done = run_kmsfs(["mount", site.source, mountpoint], env=site.env, exit_code=None)
    assert done.exit_code == 7
    assert re.match(rf"kmsfs: error: {mountpoint}.* {expected}", done.stderr)
    assert processes_of(mountpoint) == []


def test_mounting_over_the_source_or_inside_it_is_refused(site: Site) -> None:
    site.make_volume()
    inside = site.source / "inside"
    inside.mkdir()
    for mountpoint in (site.source, inside, site.source.parent):
        done = run_kmsfs(["mount", site.source, mountpoint], env=site.env, exit_code=None)
        assert (done.exit_code, mounts.find_mount(str(mountpoint))) == (7, None)


def test_mount_without_any_key_is_refused(site: Site, tmp_path: Path) -> None:
    mountpoint = tmp_path / "target"
    mountpoint.mkdir()
    done = run_kmsfs(["mount", site.source, mountpoint], env=site.env, exit_code=None)
    assert done.exit_code == 2
    assert "kmsfs: error: no key is allowed to decrypt anything" in done.stderr


def test_a_mount_left_dead_by_killed_processes_is_healed(served: MountedVolume, site: Site) -> None:
    pids = processes_of(served.path)
    for pid in pids:
        if process_name(pid) == "kmsfs-launcher":
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)
    assert mounts.is_dead(str(served.path))
    served.kmsfs("mount", served.source, served.path)
    assert len((served.path / "key").read_bytes()) == 5000
    below = [m for m in mounts.mount_table() if m.mountpoint == str(served.path)]
    assert len(below) == 1


def test_umount_of_a_dead_mount_works(served: MountedVolume) -> None:
    pids = processes_of(served.path)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)
    served.umount()
    assert served.mount is None


def test_a_killed_daemon_is_replaced_on_a_new_mount(served: MountedVolume) -> None:
    old_device = served.mount.device if served.mount else ""
    old_pid = served.status()["daemon_pid"]
    os.kill(old_pid, signal.SIGKILL)
    wait_gone(old_pid)
    wait_until(lambda: strerror_of_cat(served.path / "key") == "", "it serves again")
    assert served.status()["daemon_pid"] != old_pid
    assert served.mount is not None
    assert old_device
    below = [m for m in mounts.mount_table() if m.mountpoint == str(served.path)]
    assert len(below) == 1


def test_readers_get_an_error_at_once_when_the_daemon_dies(served: MountedVolume) -> None:
    with (served.path / "key").open("rb", buffering=0) as opened:
        os.kill(served.status()["daemon_pid"], signal.SIGKILL)
        with pytest.raises(OSError, match=r"not connected|abort"):
            read_for_ever(opened)
    # What comes in its place would outlive the test.
    wait_until(lambda: strerror_of_cat(served.path / "key") == "", "it serves again")


def test_a_killed_zygote_is_replaced_when_it_is_needed(served: MountedVolume, site: Site) -> None:
    zygote_pid = served.status()["zygote_pid"]
    os.kill(zygote_pid, signal.SIGKILL)
    wait_gone(zygote_pid)
    content = site.secret("later", 100)
    site.encrypt("later", content)
    assert (served.path / "later").read_bytes() == content
    assert served.status()["zygote_pid"] != zygote_pid


def test_foreground_serves_until_interrupted(site: Site, tmp_path: Path) -> None:
    site.make_volume()
    content = site.secret("key", 100)
    site.encrypt("key", content)
    mountpoint = tmp_path / "foreground"
    mountpoint.mkdir()
    launcher = subprocess.Popen(
        [*KMSFS, "mount", site.source, mountpoint, "--foreground"],
        env=dict(site.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((mountpoint / "key").exists, "the mount is there")
    assert (mountpoint / "key").read_bytes() == content
    launcher.send_signal(signal.SIGINT)
    output, errors = launcher.communicate(timeout=20)
    assert (launcher.returncode, output) == (0, "")
    assert "decrypted key: 100 bytes" in errors
    assert os.listdir(mountpoint) == []


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)],
)
def test_mounting_that_is_interrupted_leaves_nothing_mounted(
    site: Site, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    site.make_volume()
    mountpoint = tmp_path / "interrupted"
    mountpoint.mkdir()
    command = subprocess.Popen(
        [sys.executable, "-c", _MOUNT_WHEN_TOLD, site.source, mountpoint],
        env=dict(site.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert command.stdout is not None
    assert command.stdout.read(7) == b"waiting"
    command.send_signal(number)
    command.communicate(b"!", timeout=20)
    assert command.returncode == status
    assert mounts.find_mount(str(mountpoint)) is None
    assert processes_of(mountpoint) == []


def test_mounting_with_closed_standard_streams_serves(site: Site, tmp_path: Path) -> None:
    site.make_volume()
    content = site.secret("key", 100)
    site.encrypt("key", content)
    volume = MountedVolume(site.source, tmp_path / "closed", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    closed = ("bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash")
    run_kmsfs(["mount", site.source, volume.path], env=site.env, prefix=closed)
    assert (volume.path / "key").read_bytes() == content
    assert len(volume.status()["cached"]) == 1


def test_a_source_whose_path_is_not_utf_8_is_refused(site: Site, tmp_path: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(source)
    mountpoint = tmp_path / "target"
    mountpoint.mkdir()
    done = run_kmsfs(["mount", source, mountpoint, "--any-key"], env=site.env, exit_code=2)
    assert "is not UTF-8" in done.stderr


def test_unknown_mount_option_is_refused(site: Site, tmp_path: Path) -> None:
    done = run_kmsfs(
        ["mount", site.source, tmp_path, "-o", "colour=red"], env=site.env, exit_code=None
    )
    assert done.exit_code == 2
    assert "unknown mount option 'colour'" in done.stderr


def read_for_ever(opened: io.FileIO) -> None:
    while opened.read(1):
        opened.seek(0)


def locked_pages(pid: int) -> int:
    """VmLck of a process, in pages."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmLck:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024 // os.sysconf("SC_PAGESIZE")
