"""Another process of the mounting user cannot look into kmsfs, which that user could read."""

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.memory_scan import ranges_of
from tests.support.mounts import process_name, processes_of
from tests.support.sites import StrictSite
from tests.support.unprivileged import become_user, session

_PTRACE_ATTACH = 16
_PTRACE_SEIZE = 0x4206
_SYS_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.syscall.restype = ctypes.c_long


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_memory(pid: int, _address: int) -> None:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))


def read_environment(pid: int, _address: int) -> None:
    Path(f"/proc/{pid}/environ").read_bytes()


def open_descriptors(pid: int, _address: int) -> None:
    os.close(os.open(f"/proc/{pid}/fd/0", os.O_RDONLY))


def take_descriptor(pid: int, _address: int) -> None:
    pidfd = os.pidfd_open(pid)
    fd = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, 0, 0)
    _checked(fd)


def attach(pid: int, _address: int) -> None:
    _checked(_libc.ptrace(_PTRACE_ATTACH, pid, None, None))


def seize(pid: int, _address: int) -> None:
    _checked(_libc.ptrace(_PTRACE_SEIZE, pid, None, None))


def read_memory(pid: int, address: int) -> None:
    buffer = ctypes.create_string_buffer(16)
    ours = _IoVec(ctypes.addressof(buffer), 16)
    theirs = _IoVec(address, 16)
    count = _libc.process_vm_readv(
        ctypes.c_int(pid), ctypes.byref(ours), ctypes.c_ulong(1),
        ctypes.byref(theirs), ctypes.c_ulong(1), ctypes.c_ulong(0),
    )  # fmt: skip
    _checked(count)


ATTEMPTS: tuple[Callable[[int, int], None], ...] = (
    open_memory,
    read_environment,
    open_descriptors,
    take_descriptor,
    attach,
    seize,
    read_memory,
)


def succeeds(attempt: Callable[[int, int], None], pid: int) -> bool:
    """Whether that user can do this to a process; the attempt ends with the one who makes it."""
    address = next(found.start for found in ranges_of(pid) if found.name == "[stack]")

    def make() -> bool:
        become_user()
        try:
            attempt(pid, address)
        except PermissionError:
            return False
        return True

    status = forked.wait(forked.start(make))
    # One that was attached to is left stopped.
    os.kill(pid, signal.SIGCONT)
    assert status in (0, 1), f"{attempt.__name__} failed in another way"
    return status == 0


@pytest.fixture
def of_the_user(strict_site: StrictSite, public_directory: Path) -> Iterator[dict[str, int]]:
    """The processes of a mount of that user, from which a file has just been read, by name."""
    site = dataclasses.replace(strict_site, directory=public_directory)
    site.source.mkdir()
    site.make_volume()
    site.encrypt("key", site.secret("key", 5000))
    mountpoint = public_directory / "mnt"
    mountpoint.mkdir()
    os.chown(mountpoint, forked.NOBODY, forked.NOBODY)
    kmsfs = [sys.executable, "-m", "kmsfs"]
    commands = [
        [*kmsfs, "mount", str(site.source), str(mountpoint)],
        ["cmp", "--bytes=5000", str(mountpoint / "key"), str(mountpoint / "key")],
        [*kmsfs, "umount", str(mountpoint)],
    ]
    with session(commands, env=site.env):
        yield {process_name(pid): pid for pid in processes_of(mountpoint)}


def test_processes_of_a_mount_are_closed_to_other_processes_of_their_user(
    of_the_user: dict[str, int],
) -> None:
    assert set(of_the_user) == {"kmsfs-launcher", "kmsfs-daemon", "kmsfs-zygote", "kmsfs-worker"}
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in of_the_user.values()} == {forked.NOBODY}
    done = [
        (name, attempt.__name__)
        # An idle worker ends after some seconds: it comes first.
        for name, pid in reversed(of_the_user.items())
        for attempt in ATTEMPTS
        if succeeds(attempt, pid)
    ]
    assert done == []


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_ordinary_process_is_open_to_other_processes_of_its_user(
    mountable: None, attempt: Callable[[int, int], None]
) -> None:
    ready_r, ready_w = os.pipe()

    def be_ordinary() -> bool:
        become_user()
        os.write(ready_w, b"x")
        signal.pause()
        return True

    pid = forked.start(be_ordinary)
    os.close(ready_w)
    try:
        assert os.read(ready_r, 1) == b"x"
        assert succeeds(attempt, pid)
    finally:
        os.close(ready_r)
        os.kill(pid, signal.SIGKILL)
        forked.wait(pid)
