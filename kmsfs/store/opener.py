"""Asks the launcher to open what this process, running as an unprivileged user, may not."""

import errno
import os
import socket
import threading
from typing import Final

from kmsfs.decryptor import wire

# The launcher answers in microseconds, unless it is busy replacing a process.
_ANSWER_S: Final = 10.0


class RemoteOpener:
    """`OpenForUs` over a socket to the launcher; for use from any thread.

    Args:
        sock: this end; no longer usable for anything else.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_ANSWER_S)
        self._sock = sock
        self._one_at_a_time = threading.Lock()
        self._failed = False

    def __call__(self, path: str, flags: int) -> int:
        """A descriptor of a path of the source, the caller's to close.

        Raises:
            OSError: as openat2(2) has it; EIO if the launcher does not answer.
        """
        with self._one_at_a_time:
            # An answer that comes too late would be taken for that of the next request.
            if self._failed:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            try:
                wire.send(self._sock, wire.OpenSource(path=path, flags=flags))
                message, fd = wire.receive(self._sock)
            except wire.DescriptorLostError:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path) from None
            except wire.WireError:
                self._failed = True
                raise OSError(errno.EIO, os.strerror(errno.EIO), path) from None
        match message:
            case wire.SourceOpened() if fd is not None:
                return fd
            case wire.SourceRefused():
                raise OSError(message.errno, os.strerror(message.errno), path)
            case _:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
