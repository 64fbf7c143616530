"""Processes that a test leaves behind are found, whatever they did to get away, and ended."""

import os
import subprocess
import sys
from pathlib import Path

from kmsfs import libc
from kmsfs.views import mountpoint as mounts
from tests.support import leftovers
from tests.support.requirements import require_mount

# Forks twice with a session of its own, so that nothing but adoption leads back here.
_DAEMON = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.execve(sys.executable, [sys.executable, "-c", "import signal; signal.pause()", "daemon"], {})
"""


def test_daemon_in_a_session_of_its_own_is_found_and_killed(tmp_path: Path) -> None:
    before = leftovers.children()
    subprocess.run([sys.executable, "-c", _DAEMON], check=True, timeout=10)
    problems = leftovers.clean_up(before, tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("process ")
    assert leftovers.children() == before


def test_child_that_has_ended_is_reaped_and_not_reported(tmp_path: Path) -> None:
    before = leftovers.children()
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert leftovers.clean_up(before, tmp_path) == []


def test_kept_process_is_left_alone(tmp_path: Path) -> None:
    before = leftovers.children()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        leftovers.keep(process.pid)
        assert leftovers.clean_up(before, tmp_path) == []
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()


def test_mount_below_the_tests_directory_is_unmounted_and_named(tmp_path: Path) -> None:
    require_mount()
    place = tmp_path / "mnt"
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
        libc.mount("kmsfs", str(place), mounts.FS_TYPE, libc.MS_RDONLY, options)
    finally:
        # Nobody answers from now on, as after a killed daemon.
        os.close(fd)
    assert leftovers.clean_up(leftovers.children(), tmp_path) == [f"mount {place}"]
    assert mounts.find_mount(str(place)) is None


def test_ramfs_of_kmsfs_below_the_tests_directory_is_unmounted_and_named(tmp_path: Path) -> None:
    require_mount()
    place = tmp_path / "mnt"
    place.mkdir()
    libc.mount(mounts.RAM_SOURCE_PREFIX + "source", str(place), "ramfs", 0, "mode=0700")
    assert leftovers.clean_up(leftovers.children(), tmp_path) == [f"mount {place}"]
    assert mounts.find_mount(str(place)) is None
