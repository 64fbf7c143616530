"""The launcher's zygote: one at a time, and not one after the other without a pause."""

import contextlib
import socket
import time
from typing import Final

from kmsfs.decryptor import wire
from kmsfs.launcher import children
from kmsfs.launcher.children import Child
from kmsfs.settings import KmsSettings

# Between zygotes: one that dies at once must not become a busy loop.
_PAUSE_S: Final = 0.5

# For the kernel to end what was killed.
_KILLED_S: Final = 8.0


class Zygote:
    """Starts and ends the zygote of one mount.

    Args:
        quiet: it gets no standard streams.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._child: Child | None = None
        self._started_at = -_PAUSE_S

    @property
    def pidfd(self) -> int | None:
        """Readable once it has ended; None if there is none."""
        return None if self._child is None else self._child.pidfd

    def start(self, settings: KmsSettings, daemon: socket.socket | None) -> None:
        """A new zygote in place of the one there was, and its socket to the daemon."""
        self.end()
        pause_s = self._started_at + _PAUSE_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        self._started_at = time.monotonic()
        zygote_end, daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with zygote_end, daemon_end, children.memory_file(settings) as settings_fd:
            self._child = children.spawn(
                "kmsfs.decryptor.zygote",
                [zygote_end.fileno(), settings_fd],
                [],
                children.zygote_environment(),
                quiet=self._quiet,
            )
            if daemon is not None:
                with contextlib.suppress(wire.WireError):
                    wire.send(daemon, wire.NewZygote(), [daemon_end.fileno()])

    def reap(self) -> None:
        """Take note that it has ended."""
        if self._child is not None and self._child.wait(0) is not None:
            self._child = None

    def end(self) -> None:
        """Kill it, and with it its workers."""
        if self._child is not None:
            self._child.kill_now(_KILLED_S)
            self._child = None
