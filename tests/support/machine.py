"""Changes to the machine that a test makes for a moment: one at a time, and undone for certain."""

import contextlib
import fcntl
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kmsfs import libc
from tests.support.mounts import wait_until

_LOCKS = Path("/run")
_TURN_S = 120.0
_COMMAND_S = 20.0

# Undoes what it did when its standard input ends, so also when the test run is killed.
_GUARD = """
trap '' INT TERM HUP
PATH=$PATH:/usr/sbin:/sbin
{do} || exit 1
echo done
read -r _
{undo}
"""


class RefusedError(Exception):
    """The machine does not allow the change; the text says what it says."""


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Have a thing that the machine has only once, among all test runs on it.

    Raises:
        AssertionError: others have it for too long.
    """
    fd = os.open(_LOCKS / f"kmsfs-tests-{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        wait_until(lambda: _try_lock(fd), f"{name} is free", _TURN_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def changed(do: str, undo: str) -> Iterator[None]:
    """Run a shell command, and `undo` when the block ends or this process dies.

    Raises:
        RefusedError: `do` failed; nothing is undone.
        AssertionError: `undo` failed.
    """
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD.format(do=do, undo=undo)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert guard.stdout is not None
    if guard.stdout.readline() != "done\n":
        _, said = guard.communicate(timeout=_COMMAND_S)
        raise RefusedError(said.strip())
    try:
        yield
    finally:
        _, said = guard.communicate(timeout=_COMMAND_S)
        assert guard.returncode == 0, f"{undo}: {said}"


@contextlib.contextmanager
def kernel_setting(path: Path, value: str) -> Iterator[None]:
    """Give a file below /proc/sys or /sys another value for a while.

    Raises:
        RefusedError: it cannot be written.
    """
    before = path.read_text().rstrip("\n")
    write = "printf '%s\\n' {} > {}"
    with changed(
        write.format(shlex.quote(value), shlex.quote(str(path))),
        write.format(shlex.quote(before), shlex.quote(str(path))),
    ):
        yield


@contextlib.contextmanager
def mounted_filesystem(fs_type: str, path: Path) -> Iterator[Path]:
    """A filesystem without a device, such as tmpfs, on a new directory. Needs root."""
    path.mkdir()
    libc.mount(fs_type, str(path), fs_type, libc.MS_NOSUID | libc.MS_NODEV, "")
    try:
        yield path
    finally:
        wait_until(lambda: _unmounted(path), f"{path} is not in use")


def _unmounted(path: Path) -> bool:
    try:
        libc.umount2(str(path), libc.UMOUNT_NOFOLLOW)
    except OSError:
        return False
    return True
