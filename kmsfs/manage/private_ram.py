"""A ramfs that one command and its children see, and a program that can write nowhere else."""

import contextlib
import os
import signal
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from kmsfs import libc
from kmsfs.errors import GuaranteeNotMet, UsageInvalid

_PLACE: Final = "/run"

_ZEROS: Final = bytes(1 << 16)

# As shells have it.
_NOT_FOUND: Final = 127


@contextlib.contextmanager
def private_ramfs() -> Iterator[Path]:
    """A directory on a ramfs that is mounted for this process and its children alone.

    This process leaves the mounts that all others see: what it mounts later is its own too. In
    the end every file is overwritten and the ramfs unmounted; it goes with the last process that
    sees it even if this one is killed.

    Raises:
        GuaranteeNotMet: only root can mount one.
    """
    if os.geteuid() != 0:
        raise GuaranteeNotMet(
            "plaintext needs a ramfs here, and only root can mount one", hint="do it as root"
        )
    directory = Path(tempfile.mkdtemp(prefix="kmsfs-private-", dir=_PLACE))
    try:
        libc.leave_mount_namespace()
        flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
        libc.mount("kmsfs-private", str(directory), "ramfs", flags, "mode=0700")
    except OSError as error:
        directory.rmdir()
        raise GuaranteeNotMet(f"cannot mount a private ramfs: {error.strerror}") from error
    try:
        yield directory
    finally:
        _wipe(directory)
        libc.umount2(str(directory), libc.MNT_DETACH)
        directory.rmdir()


def run_confined(argv: Sequence[str], directory: Path, environment: Mapping[str, str]) -> int:
    """Run a program on the terminal, for which every filesystem but `directory`'s is read-only.

    Whatever it keeps beside the file that it is given (swap files, backups, undo, history) can
    lie nowhere else. It ends with this process.

    Args:
        argv: looked for in PATH.
        directory: a mount; also the program's TMPDIR.

    Returns: its exit status; of a signal, its number, negative.
    Raises:
        UsageInvalid: there is no such program.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _TERMINAL_SIGNALS}
    try:
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            _exec_confined(argv, directory, environment, parent_pid)
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    if code == _NOT_FOUND:
        raise UsageInvalid(f"there is no program {argv[0]}", hint="set EDITOR to one that is there")
    return code


# A terminal sends these to all of its processes: they are the program's.
_TERMINAL_SIGNALS: Final = (signal.SIGINT, signal.SIGQUIT)


def _exec_confined(
    argv: Sequence[str], directory: Path, environment: Mapping[str, str], parent_pid: int
) -> None:
    """In the child: never returns."""
    try:
        for number in (*_TERMINAL_SIGNALS, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
        libc.leave_mount_namespace()
        libc.set_mount_read_only("/", read_only=True, below=True)
        libc.set_mount_read_only(str(directory), read_only=False)
        os.execvpe(  # noqa: S606 - the editor that the user named
            argv[0], list(argv), {**environment, "TMPDIR": str(directory)}
        )
    except FileNotFoundError:
        os._exit(_NOT_FOUND)
    except BaseException:  # noqa: BLE001 - the parent's code must not run on in the child
        os._exit(1)


def _wipe(directory: Path) -> None:
    for place, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(place, name)
            # One that an editor made unreadable, or a socket of it, is no reason to leave others.
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    info = os.fstat(fd)
                    if stat.S_ISREG(info.st_mode):
                        _overwrite(fd, info.st_size)
                finally:
                    os.close(fd)


def _overwrite(fd: int, size_bytes: int) -> None:
    offset = 0
    while offset < size_bytes:
        offset += os.pwrite(fd, _ZEROS[: size_bytes - offset], offset)
