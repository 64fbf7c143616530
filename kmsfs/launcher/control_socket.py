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
        self._inode: int | None = None

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
            self._inode = os.stat(self._path).st_ino
            os.chmod(self._path, 0o600)
            listener.listen()
            yield listener

    def remove(self) -> None:
        """Take the name away, if it is still this socket's.

        Once unmounted, the device number may be another mount's, and the path too.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
