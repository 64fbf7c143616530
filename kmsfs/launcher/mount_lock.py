"""Of several launchers that would mount at one place at the same instant, one does."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator

from kmsfs.admin import control
from kmsfs.errors import MountpointUnusable


@contextlib.contextmanager
def hold(mountpoint: str) -> Iterator[None]:
    """Be the only one who mounts at this path, from looking at it until the mount answers.

    After that whoever comes sees the mount. The kernel gives the lock up for a process that is
    killed.

    Args:
        mountpoint: absolute, without symbolic links.

    Raises:
        MountpointUnusable: another process holds it.
        ControlUnavailable: there is no directory for the lock; see `control.socket_directory`.
        OSError.
    """
    directory = control.socket_directory(os.geteuid())
    os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = os.path.join(directory, _name(mountpoint))
    fd = _locked(path, mountpoint)
    try:
        yield
    finally:
        # While it is held, so that nobody can come to hold a file that is gone already.
        os.unlink(path)
        os.close(fd)


def _locked(path: str, mountpoint: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BlockingIOError:
            os.close(fd)
            raise MountpointUnusable(
                f"another process is just mounting at {mountpoint}",
                hint="see `kmsfs status`",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        # Its last holder has unlinked it meanwhile.
        os.close(fd)


def _name(mountpoint: str) -> str:
    """By directory and name: what is mounted there already has other numbers, or is dead."""
    parent, name = os.path.split(mountpoint)
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    try:
        info = os.stat(parent)
    except OSError as error:
        raise MountpointUnusable(
            f"{mountpoint} does not exist: {error.strerror}", hint=f"mkdir -p {mountpoint}"
        ) from error
    return f"{info.st_dev}-{info.st_ino}-{digest}.lock"
