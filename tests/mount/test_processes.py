"""The process tree of a running mount, looked at from outside."""

import os
from pathlib import Path

import pytest

from tests.support.mounts import (
    MountedVolume,
    children_of,
    environment_of,
    parent_of,
    process_name,
)
from tests.support.sites import Site


@pytest.fixture
def served(site: Site) -> MountedVolume:
    """A mount with one file, `key`, that has just been read."""
    site.make_volume()
    site.encrypt("key", site.secret("key", 5000))
    volume = site.mount()
    assert len((volume.path / "key").read_bytes()) == 5000
    return volume


def pids_by_name(volume: MountedVolume) -> dict[str, int]:
    launcher_pid = volume.launcher_pid
    return {process_name(pid): pid for pid in (launcher_pid, *children_of(launcher_pid))}


def test_tree_is_launcher_with_daemon_and_zygote_with_workers(served: MountedVolume) -> None:
    pids = pids_by_name(served)
    assert set(pids) == {"kmsfs-launcher", "kmsfs-daemon", "kmsfs-zygote", "kmsfs-worker"}
    assert parent_of(pids["kmsfs-daemon"]) == pids["kmsfs-launcher"]
    assert parent_of(pids["kmsfs-zygote"]) == pids["kmsfs-launcher"]
    assert parent_of(pids["kmsfs-worker"]) == pids["kmsfs-zygote"]


def test_daemon_has_a_clean_environment(served: MountedVolume) -> None:
    environment = environment_of(pids_by_name(served)["kmsfs-daemon"])
    assert set(environment) == {"PATH", "LANG"}


def test_daemon_has_loaded_no_aws_library(served: MountedVolume) -> None:
    pids = pids_by_name(served)
    # Every imported module leaves its file's path in the interpreter's heap.
    marks = (b"/botocore/", b"/boto3/", b"/aws_encryption_sdk/", b"/urllib3/")
    assert all(in_memory(pids["kmsfs-zygote"], mark) for mark in marks)
    assert not any(in_memory(pids["kmsfs-daemon"], mark) for mark in marks)
    assert in_memory(pids["kmsfs-daemon"], b"/pyfuse3/")


def test_daemon_zygote_and_workers_are_undumpable_without_core(served: MountedVolume) -> None:
    pids = pids_by_name(served)
    for name in ("kmsfs-daemon", "kmsfs-zygote", "kmsfs-worker"):
        limits = Path(f"/proc/{pids[name]}/limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
    status = served.status()
    assert status["daemon"]["undumpable"]
    assert status["workers"]["undumpable"]
    assert status["workers"]["allocator_scrubs"]


def test_the_kernel_confines_the_daemon_and_no_gap_goes_unsaid(served: MountedVolume) -> None:
    kept = kernel_status(pids_by_name(served)["kmsfs-daemon"])
    assert (kept["NoNewPrivs"], kept["Seccomp"]) == ("1", "2")
    control = kernel_status(os.getpid())
    assert (control["NoNewPrivs"], control["Seccomp"]) == ("0", "0")
    status = served.status()
    assert status["daemon"]["sandbox"]["seccomp"]
    gaps = status["daemon"]["sandbox"]["gaps"]
    shown = [text for text in status["weaknesses"] if text.startswith("the daemon")]
    assert shown == [f"the daemon not fully confined: {gap}" for gap in gaps]


def test_worker_locks_all_its_memory(served: MountedVolume) -> None:
    assert served.status()["workers"]["memory_locked"]
    flags = Path(f"/proc/{pids_by_name(served)['kmsfs-worker']}/smaps").read_text()
    mappings = [line.split()[1:] for line in flags.splitlines() if line.startswith("VmFlags:")]
    unlocked = [f for f in mappings if "lo" not in f and "io" not in f and "pf" not in f]
    # The kernel's own pages (vvar, vdso, vsyscall) cannot be locked and hold nothing of ours.
    assert len(unlocked) <= 4


def test_only_the_daemon_holds_the_fuse_device(served: MountedVolume) -> None:
    holders = [
        name
        for name, pid in pids_by_name(served).items()
        for fd in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/fuse"
    ]
    assert holders == ["kmsfs-daemon"]


def test_daemon_has_no_network_socket(served: MountedVolume) -> None:
    pid = pids_by_name(served)["kmsfs-daemon"]
    inodes = {
        os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").rstrip("]")
        for fd in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
    }
    unix = Path("/proc/net/unix").read_text().splitlines()[1:]
    assert inodes
    assert inodes <= {line.split()[6] for line in unix}


def test_processes_inherit_only_the_descriptors_meant_for_them(served: MountedVolume) -> None:
    for name, pid in pids_by_name(served).items():
        targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        leaked = [t for t in targets if t.startswith(("/tmp", str(served.path.parent)))]
        if name == "kmsfs-daemon":
            leaked = [t for t in leaked if t != str(served.source)]
        assert leaked == []


def test_daemon_loads_its_code_from_nowhere_a_user_could_write(served: MountedVolume) -> None:
    pid = pids_by_name(served)["kmsfs-daemon"]
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert b"-s" in argv
    assert b"-P" in argv


def kernel_status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def in_memory(pid: int, wanted: bytes) -> bool:
    """Whether a process has these bytes anywhere in its private writable memory."""
    with (
        Path(f"/proc/{pid}/maps").open() as maps,
        Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory,
    ):
        for line in maps:
            span, permissions, *_ = line.split()
            if permissions != "rw-p":
                continue
            start, end = (int(text, 16) for text in span.split("-"))
            memory.seek(start)
            if wanted in memory.read(end - start):
                return True
    return False
