"""Who opened what: the daemon's end of the audit log. It may refuse a read; metrics never may."""

import contextlib
import errno
import itertools
import os
import socket
from dataclasses import dataclass, field

import trio

from kmsfs.admin import audit_log
from kmsfs.admin.status import AuditStatus
from kmsfs.errors import AuditFailed
from kmsfs.events import Event, Opened
from kmsfs.settings import AuditSettings


@dataclass(eq=False, slots=True)
class _Waiting:
    """Somebody who may not read before the record is written."""

    answered: trio.Event = field(default_factory=trio.Event)
    errno: int = 0


class Audit:
    """Sends every event to the launcher, which writes it; an `Opened` by `admit` only.

    Args:
        sock: to the launcher's `AuditFile`; of kind SOCK_SEQPACKET.
    """

    def __init__(self, settings: AuditSettings, sock: socket.socket) -> None:
        self._settings = settings
        sock.setblocking(False)  # noqa: FBT003
        self._raw = sock
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._problem = ""

    @property
    def status(self) -> AuditStatus:
        """What `kmsfs status` shows."""
        return AuditStatus(
            file=self._settings.file, required=self._settings.required, problem=self._problem
        )

    async def run(self) -> None:
        """Take the launcher's answers until cancelled, or until it is gone."""
        # A launcher that was killed with records unread resets the connection.
        with contextlib.suppress(OSError):
            while answer := await self._sock.recv(audit_log.ANSWER.size):
                number, code = audit_log.ANSWER.unpack(answer)
                self._note(code)
                waiting = self._waiting.get(number)
                if waiting is not None:
                    waiting.errno = code
                    waiting.answered.set()
        self._note(errno.EPIPE)
        for waiting in self._waiting.values():
            waiting.errno = errno.EPIPE
            waiting.answered.set()

    def emit(self, event: Event) -> None:
        """EventSink: record everything but a served open, which `admit` does. Never waits."""
        if not isinstance(event, Opened):
            self._send(event, next(self._numbers))

    async def admit(self, event: Opened) -> None:
        """Record an open before the program has its descriptor.

        Where the log is not required this sends the record and returns.

        Raises:
            AuditFailed: it is required, and the record could not be written.
        Cancellation: the record may be written all the same.
        """
        number = next(self._numbers)
        if not self._settings.required:
            self._send(event, number)
            await trio.lowlevel.checkpoint()
            return
        waiting = self._waiting[number] = _Waiting()
        try:
            # Records that nobody waits for may have filled the socket.
            frame = audit_log.frame_of(number, audit_log.line_of(event))
            await self._sock.send(frame, socket.MSG_NOSIGNAL)
            await waiting.answered.wait()
        except OSError as error:
            waiting.errno = error.errno or errno.EIO
        finally:
            del self._waiting[number]
        if waiting.errno:
            self._note(waiting.errno)
            raise AuditFailed(f"the open cannot be recorded: {os.strerror(waiting.errno)}")

    def _send(self, event: Event, number: int) -> None:
        frame = audit_log.frame_of(number, audit_log.line_of(event))
        try:
            self._raw.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            self._note(error.errno or errno.EIO)

    def _note(self, code: int) -> None:
        self._problem = os.strerror(code) if code else ""
