"""Opens ciphertext for a daemon that runs as an unprivileged user."""

import errno
import os
import socket
from typing import Final

from kmsfs import libc
from kmsfs.decryptor import wire
from kmsfs.store.source import RESOLVE

# All that a Source asks for; nothing that could create, change or wait.
_ALLOWED_FLAGS: Final = (
    os.O_RDONLY
    | os.O_PATH
    | os.O_DIRECTORY
    | os.O_NOFOLLOW
    | os.O_NONBLOCK
    | os.O_NOCTTY
    | os.O_CLOEXEC
)


class SourceOpener:
    """Answers one daemon: descriptors for reading, of paths beneath one source.

    Raises:
        OSError: the source cannot be opened.
    """

    item: Final[wire.Handed] = "opener"

    def __init__(self, root: str) -> None:
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._ours, self.daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fileno(self) -> int:
        """Readable when there is something to answer."""
        return self._ours.fileno()

    def answer(self) -> bool:
        """Answer one request; False once the daemon has closed its end."""
        try:
            request, _ = wire.expect(wire.receive(self._ours), wire.OpenSource)
        except wire.WireError:
            return False
        try:
            fd = self._open(request)
        except OSError as error:
            wire.send(self._ours, wire.SourceRefused(errno=error.errno or errno.EIO))
            return True
        try:
            wire.send(self._ours, wire.SourceOpened(), [fd])
        finally:
            os.close(fd)
        return True

    def close(self) -> None:
        """Answer no more."""
        self._ours.close()
        self.daemon_end.close()
        os.close(self._root_fd)

    def _open(self, request: wire.OpenSource) -> int:
        if request.flags & ~_ALLOWED_FLAGS:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return libc.openat2(self._root_fd, request.path, request.flags, RESOLVE)
