"""Daemons that die, starts that are interrupted, and two starts at one instant."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.errors import KmsfsError, MountpointUnusable
from kmsfs.launcher import mount_lock
from kmsfs.views import mountpoint as mounts
from tests.support.commands import KMSFS, run_kmsfs
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import (
    MountedVolume,
    children_of,
    processes_of,
    strerror_of_cat,
    wait_gone,
    wait_until,
)
from tests.support.sites import Site, StrictSite

# Promised is about a second; more than this is a hang, not a slow machine.
_RESTARTED_S = 5.0

# The daemon's own deadline and the launcher's above it.
_ENDED_S = 9.0

_VIEWS = pytest.mark.parametrize("view", ["fuse", "ramfs"])


@pytest.fixture
def content(site: Site) -> bytes:
    """What is in the file `key`."""
    site.make_volume()
    content = site.secret("key", 5000)
    site.encrypt("key", content)
    return content


def kill_daemon(volume: MountedVolume) -> None:
    pid = volume.status()["daemon_pid"]
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


def mounted_at(path: Path) -> list[mounts.Mount]:
    return [mount for mount in mounts.mount_table() if mount.mountpoint == str(path)]


def being_mounted(path: Path) -> bool:
    """Whether a launcher has not heard yet that the mount is ready."""
    try:
        with mount_lock.hold(str(path)):
            return False
    except MountpointUnusable:
        return True


def assert_nothing_is_left(path: Path) -> None:
    wait_until(lambda: processes_of(path) == [], "every process has ended")
    assert mounted_at(path) == []
    assert os.listdir(path) == []


def test_a_killed_daemon_is_replaced_within_seconds(site: Site, content: bytes) -> None:
    volume = site.mount("--view", "fuse")
    started = time.monotonic()
    kill_daemon(volume)
    wait_until(lambda: strerror_of_cat(volume.path / "key") == "", "it serves again", _RESTARTED_S)
    print(f"replaced within {time.monotonic() - started:.2f} s")
    assert (volume.path / "key").read_bytes() == content


@_VIEWS
def test_what_was_locked_is_locked_after_the_daemon_was_replaced(
    site: Site, content: bytes, view: str
) -> None:
    volume = site.mount("--require-all")
    assert (volume.path / "key").read_bytes() == content
    volume.kmsfs("lock", volume.path)
    kill_daemon(volume)
    wait_until(lambda: is_served(volume), "another daemon serves", _RESTARTED_S)
    status = volume.status()
    assert (status["locked"], status["cached"], status["worker_pids"]) == (True, [], [])
    error = {"fuse": "Required key not available", "ramfs": "No such file or directory"}[view]
    assert strerror_of_cat(volume.path / "key") == error
    volume.kmsfs("unlock", volume.path)
    assert (volume.path / "key").read_bytes() == content
    kill_daemon(volume)
    wait_until(lambda: is_served(volume), "another daemon serves", _RESTARTED_S)
    assert not volume.status()["locked"]
    assert (volume.path / "key").read_bytes() == content


def is_served(volume: MountedVolume) -> bool:
    """Whether a daemon answers."""
    with contextlib.suppress(KmsfsError, AssertionError):
        return bool(volume.status())
    return False


@pytest.mark.parametrize("option", [("--no-restart",), ("-o", "no_restart")])
def test_without_restart_the_mount_stays_dead_until_it_is_mounted_again(
    site: Site, content: bytes, option: tuple[str, ...]
) -> None:
    volume = site.mount("--view", "fuse", *option)
    pids = processes_of(volume.path)
    kill_daemon(volume)
    for pid in pids:
        wait_gone(pid)
    assert strerror_of_cat(volume.path / "key") == "Transport endpoint is not connected"
    volume.kmsfs("mount", site.source, volume.path, "--view", "fuse")
    assert (volume.path / "key").read_bytes() == content
    assert len(mounted_at(volume.path)) == 1


def test_without_restart_the_launcher_says_that_the_daemon_died(
    site: Site, content: bytes, tmp_path: Path
) -> None:
    volume = MountedVolume(site.source, tmp_path / "foreground", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    launcher = subprocess.Popen(
        [*KMSFS, "mount", site.source, volume.path, "--foreground", "--no-restart"],
        env=dict(site.env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((volume.path / "key").exists, "the mount is there")
    wait_until(lambda: not being_mounted(volume.path), "the launcher knows that it is ready")
    kill_daemon(volume)
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 7
    assert "the daemon ended with status -9, and is not to be replaced" in errors
    volume.umount()
    assert_nothing_is_left(volume.path)


def test_without_restart_a_ramfs_keeps_its_files(site: Site, content: bytes) -> None:
    volume = site.mount("--view", "ramfs", "--no-restart")
    pids = processes_of(volume.path)
    kill_daemon(volume)
    for pid in pids:
        wait_gone(pid)
    assert (volume.path / "key").read_bytes() == content
    assert "no process keeps it in step" in volume.kmsfs("status", volume.path).output
    volume.umount()
    assert_nothing_is_left(volume.path)


# --- containers ----------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory on a shared mount of its own."""
    path = tmp_path / "shared"
    path.mkdir()
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", path], check=True)
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_container_that_binds_the_parent_with_rslave_sees_the_new_mount(
    site: Site, content: bytes, shared: Path, tmp_path: Path
) -> None:
    volume = site.mount("--view", "fuse", path=shared / "mnt")
    inside = tmp_path / "inside"
    inside.mkdir()
    script = f"""
    mount --rbind {shared} {inside} && mount --make-rslave {inside} || exit 1
    while read line; do cat {inside}/mnt/key | wc -c; done
    """
    container = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "unchanged", "bash", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def size_inside() -> str:
        assert container.stdin is not None
        assert container.stdout is not None
        print("", file=container.stdin, flush=True)
        return container.stdout.readline().strip()

    try:
        assert size_inside() == "5000"
        kill_daemon(volume)
        wait_until(lambda: size_inside() == "5000", "the new mount is seen", _RESTARTED_S)
    finally:
        container.communicate(timeout=20)
        subprocess.run(["umount", "-l", inside], check=False, stderr=subprocess.DEVNULL)
    volume.umount()


# --- ending --------------------------------------------------------------------------------------


@_VIEWS
def test_sigterm_ends_within_its_deadline_though_readers_hold_files(
    site: Site, content: bytes, view: str
) -> None:
    volume = site.mount()
    pids = processes_of(volume.path)
    fds = [os.open(volume.path / "key", os.O_RDONLY) for _ in range(20)]
    try:
        assert os.read(fds[0], 1) == content[:1]
        os.kill(volume.launcher_pid, signal.SIGTERM)
        started = time.monotonic()
        for pid in pids:
            wait_gone(pid, _ENDED_S)
        print(f"ended within {time.monotonic() - started:.2f} s")
        assert volume.mount is None
    finally:
        for fd in fds:
            # What is unmounted has nobody to tell of a close.
            with contextlib.suppress(OSError):
                os.close(fd)


@_VIEWS
def test_a_start_that_is_terminated_at_any_moment_is_done_or_leaves_nothing(
    site: Site, content: bytes, view: str, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    path.mkdir()
    started = time.monotonic()
    volume = site.mount(path=path)
    whole_s = time.monotonic() - started
    volume.umount()
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, a start takes {whole_s:.2f} s")
    chance = random.Random(seed)
    for _ in range(8):
        command = subprocess.Popen(
            [*KMSFS, "mount", site.source, path, "--view", view],
            env=dict(site.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(chance.uniform(0.0, whole_s))
        command.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
        if command.wait(20) == 0:
            assert (path / "key").read_bytes() == content
            volume.umount()
        assert_nothing_is_left(path)


def test_a_ramfs_that_is_being_filled_is_gone_after_sigterm(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    path = site.directory / "mnt"
    path.mkdir()
    fault_proxy.inject(Fault.HANG)
    command = subprocess.Popen(
        [*KMSFS, "mount", site.source, path, "--view", "ramfs"],
        env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: fault_proxy.requests > 0, "KMS is asked")
    assert len(mounted_at(path)) > 0
    command.terminate()
    assert command.wait(20) == 128 + signal.SIGTERM
    assert_nothing_is_left(path)


# --- two at once ---------------------------------------------------------------------------------


@_VIEWS
def test_of_two_mounts_at_one_instant_one_is_there_and_one_is_refused(
    site: Site, content: bytes, view: str, tmp_path: Path
) -> None:
    volume = MountedVolume(site.source, tmp_path / "target", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    for _ in range(10):
        commands = [
            subprocess.Popen(
                [*KMSFS, "mount", site.source, volume.path, "--view", view],
                env=dict(site.env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        said = [command.communicate(timeout=60)[1] for command in commands]
        statuses = [command.returncode for command in commands]
        assert sorted(statuses) == [0, 7], said
        assert (volume.path / "key").read_bytes() == content
        # A ramfs has two lines: what makes it read-only lies above.
        assert len({mount.device for mount in mounted_at(volume.path)}) == 1
        volume.umount()
        assert_nothing_is_left(volume.path)


def test_a_start_that_was_killed_does_not_keep_others_out(
    site: Site, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    path.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.read(4) == b"held"
    done = run_kmsfs(["mount", site.source, path], env=site.env, exit_code=7)
    assert f"kmsfs: error: another process is just mounting at {path}" in done.stderr
    holder.kill()
    holder.communicate()
    assert (site.mount(path=path).path / "key").read_bytes() == content


_HOLD = """
import os, sys
from kmsfs.launcher import mount_lock
with mount_lock.hold(sys.argv[1]):
    os.write(1, b"held")
    sys.stdin.read()
"""


# --- again and again -----------------------------------------------------------------------------


@_VIEWS
def test_a_daemon_that_is_killed_before_it_is_ready_is_replaced_too(
    site: Site, content: bytes, view: str
) -> None:
    volume = site.mount()
    launcher = volume.launcher_pid
    for _ in range(3):
        before = set(daemons_of(launcher))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        # As soon as there is a process; it takes some hundred milliseconds more to be ready.
        wait_until(
            lambda before=before: daemons_of(launcher) not in ([], sorted(before)),
            "another is started",
        )
    wait_until(lambda: strerror_of_cat(volume.path / "key") == "", "it serves again")
    assert (volume.path / "key").read_bytes() == content
    assert volume.launcher_pid == launcher


def daemons_of(launcher_pid: int) -> list[int]:
    """Process ids of the launcher's daemons, by number."""
    return sorted(pid for pid in children_of(launcher_pid) if b"kmsfs.daemon" in cmdline_of(pid))


def cmdline_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def test_one_that_always_dies_is_given_up(site: Site, content: bytes) -> None:
    volume = site.mount("--view", "fuse")
    launcher = volume.launcher_pid
    pids = processes_of(volume.path)

    def has_ended() -> bool:
        for pid in daemons_of(launcher):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return processes_of(volume.path) == []

    wait_until(has_ended, "the launcher gives up", 30.0)
    for pid in pids:
        wait_gone(pid)
    assert volume.mount is None
