"""The control socket's place in the file system; the daemon answers on it."""

import contextlib
import os
import socket
from collections.abc import Iterator

from kmsfs.admin import control


class ControlSocket:
    """A listening socket, named after a mount's device number.

    Args:
        device: `major:minor`.
    """

    def __init__(self, device: str) -> None:
        self._uid = os.geteuid()
        self._path = control.socket_path(device, self._uid)
        self._identity: tuple[int, int] | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[socket.socket]:
        """The listening socket, to be handed to the daemon.

        Raises:
            ControlUnavailable: there is no place for it.
            OSError.
        """
        directory = control.socket_directory(self._uid)
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self._path)
            os.chmod(self._path, 0o600)
            self._identity = _identity(self._path)
            listener.listen()
            yield listener

    def remove(self) -> None:
        """Take the name away, if it is still this socket's.

        Once unmounted, the device number may be another mount's, and the path too.
        """
        with contextlib.suppress(FileNotFoundError):
            if _identity(self._path) == self._identity:
                os.unlink(self._path)


def _identity(path: str) -> tuple[int, int]:
    """With its time, since a filesystem may give the same inode number to the next file."""
    info = os.stat(path)
    return info.st_ino, info.st_ctime_ns
