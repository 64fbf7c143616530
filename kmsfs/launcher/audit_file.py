"""Appends the daemon's audit records to a file."""

import contextlib
import errno
import logging
import os
import socket
from typing import Final

from kmsfs.admin import audit_log
from kmsfs.decryptor import wire
from kmsfs.errors import AuditFailed, GuaranteeNotMet
from kmsfs.settings import AuditSettings

# Records that are written by one call.
_MAX_BATCH: Final = 64

log = logging.getLogger(__name__)


class AuditFile:
    """Writes what the daemon of one mount records.

    The file is opened anew for each batch, so that it can be renamed away (logrotate) at any
    moment. Records are whole lines, in the kernel's page cache once they are answered; they are
    not synced to the disk one by one.

    Raises:
        GuaranteeNotMet: every open has to be recorded, and the view does not see opens.
        AuditFailed: the file cannot be opened.
    """

    item: Final[wire.Handed] = "audit"

    def __init__(self, settings: AuditSettings, *, view: str) -> None:
        if settings.required and view == "ramfs":
            raise GuaranteeNotMet(
                "who opens a file of the ramfs view cannot be recorded, and [audit] requires it",
                hint="--view fuse, or required = false under [audit]",
            )
        self._path = settings.file
        self._lost = 0
        self._torn = False
        try:
            os.close(self._open())
        except OSError as error:
            raise AuditFailed(f"audit log {self._path}: {error.strerror}") from None
        self._ours, self.daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)  # noqa: FBT003

    def fileno(self) -> int:
        """Readable when there is something to write."""
        return self._ours.fileno()

    def answer(self) -> bool:
        """Write what has come, and say how that went; False once the daemon is gone."""
        numbers: list[int] = []
        lines: list[bytes] = []
        gone = False
        while len(lines) < _MAX_BATCH:
            try:
                frame = self._ours.recv(audit_log.MAX_FRAME_BYTES)
            except BlockingIOError:
                break
            except OSError:
                frame = b""
            if not frame:
                gone = True
                break
            with contextlib.suppress(ValueError):
                number, line = audit_log.take_apart(frame)
                numbers.append(number)
                lines.append(line)
        if lines:
            code = self._write(lines)
            for number in numbers:
                # A daemon that was killed wants no answer.
                with contextlib.suppress(OSError):
                    self._ours.send(audit_log.ANSWER.pack(number, code), socket.MSG_NOSIGNAL)
        return not gone

    def close(self) -> None:
        """Write what a daemon that is gone had still recorded, and end."""
        self.daemon_end.close()
        while self.answer():
            if not self._has_more():
                break
        self._ours.close()

    def _has_more(self) -> bool:
        try:
            return bool(self._ours.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _write(self, lines: list[bytes]) -> int:
        """Append lines; returns 0, or the errno of why not."""
        before = [audit_log.line_of_loss(self._lost)] if self._lost else []
        data = b"".join(line + b"\n" for line in (*before, *lines))
        try:
            fd = self._open()
            try:
                # Half a line must not spoil the next one too.
                data = b"\n" + data if self._torn else data
                written = os.write(fd, data)
                self._torn = written < len(data)
            finally:
                os.close(fd)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._lost:
                log.error("audit log %s: %s", self._path, error.strerror)  # noqa: TRY400
            self._lost += len(lines)
            return error.errno or errno.EIO
        if self._lost:
            log.warning("audit log %s: written again; %d records lost", self._path, self._lost)
        self._lost = 0
        return 0

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
