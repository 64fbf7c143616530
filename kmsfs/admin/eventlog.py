"""The log: where its lines go, and which events become one. Never content."""

import logging
import logging.handlers
import sys
import time
from collections.abc import Callable
from typing import Final, Literal

from kmsfs.events import (
    BreakerClosed,
    BreakerOpened,
    ConfinementWeak,
    Decrypted,
    DecryptFailed,
    Event,
    LockChanged,
    NotShown,
    Opened,
    OpenRefused,
    Published,
    PublishHeldBack,
    Wiped,
    WorkerEnded,
)

QUIET_S: Final = 10.0
"""How long the same failure of the same file is not logged again."""

# Files that fail at once, of which is known when they were logged.
_MAX_REMEMBERED: Final = 1000

Target = Literal["stderr", "syslog"]

_SYSLOG_SOCKET: Final = "/dev/log"

log = logging.getLogger("kmsfs")


def set_up(target: Target, *, name: str) -> None:
    """Send this process's log to standard error (journald reads it there) or to syslog.

    Without a syslog socket nothing is logged: there is no file that a log could go to.
    """
    handler: logging.Handler = logging.NullHandler()
    if target == "stderr":
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            handler = logging.handlers.SysLogHandler(
                _SYSLOG_SOCKET, facility=logging.handlers.SysLogHandler.LOG_DAEMON
            )
        except OSError:
            handler = logging.NullHandler()
    handler.setFormatter(_OneLine(f"{name}: %(levelname)s: %(message)s"))
    # A log that cannot be written (no syslog here, a full pipe) must not cost or print anything.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def show_debug() -> None:
    """Also log what is only of use to find a fault. Of kmsfs alone: other libraries' logs at
    that level may hold content."""
    log.setLevel(logging.DEBUG)


class _OneLine(logging.Formatter):
    """Escapes what is not printable: a file's name must not be able to forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LogSink:
    """EventSink that writes lines. Served opens show with `show_debug` only: they are audit's
    matter. What fails in the same way again and again is a line every `QUIET_S`.

    Args:
        clock: the present, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Kind, path and error of a line, with when it was written and how many were not since.
        self._written: dict[tuple[str, str, str], tuple[float, int]] = {}

    def emit(self, event: Event) -> None:
        """Write a line for what an administrator would look for."""
        more = ""
        if isinstance(event, DecryptFailed | OpenRefused | NotShown):
            left_out = self._left_out_before(event)
            if left_out is None:
                return
            more = f" ({left_out} more times since)" if left_out else ""
        match event:
            case Decrypted():
                log.info(
                    "decrypted %s: %d bytes in %.0f ms (%s, %s)",
                    event.path,
                    event.size_bytes,
                    event.duration_s * 1000,
                    event.format,
                    event.key_id,
                )
            case DecryptFailed():
                log.warning("%s: %s: %s%s", event.path, event.error, event.detail, more)
            case OpenRefused():
                log.info(
                    "%s: open by uid %d, pid %d refused: %s%s",
                    event.path,
                    event.uid,
                    event.pid,
                    event.error,
                    more,
                )
            case LockChanged():
                log.warning("%s by uid %d", "locked" if event.locked else "unlocked", event.by_uid)
            case WorkerEnded():
                log.warning("worker %d ended: %s", event.pid, event.reason)
            case BreakerOpened():
                log.warning("KMS is away for %s: %s: %s", event.key, event.error, event.detail)
            case BreakerClosed():
                log.warning("KMS answers again for %s, after %.1f s", event.key, event.open_for_s)
            case Published():
                log.info(
                    "published %d files, %d bytes: %d added, %d changed, %d removed, %d failed",
                    event.files,
                    event.size_bytes,
                    event.added,
                    event.changed,
                    event.removed,
                    event.failed,
                )
            case NotShown():
                log.warning("%s: not shown: %s: %s%s", event.path, event.error, event.detail, more)
            case PublishHeldBack():
                log.warning("files stay as they were: %s", event.reason)
            case Opened():
                log.debug(
                    "%s: opened by uid %d, pid %d%s",
                    event.path,
                    event.uid,
                    event.pid,
                    ", held already" if event.from_cache else "",
                )
            case Wiped():
                log.debug("%s: wiped, %d bytes: %s", event.path, event.size_bytes, event.reason)
            case ConfinementWeak():
                log.warning("%s not fully confined: %s", event.process, "; ".join(event.gaps))

    def _left_out_before(self, event: DecryptFailed | OpenRefused | NotShown) -> int | None:
        """How many like this one were left out since the last line; None to leave it out too."""
        key = (type(event).__name__, event.path, event.error)
        now = self._clock()
        written_at, left_out = self._written.pop(key, (-QUIET_S, 0))
        if now - written_at < QUIET_S:
            self._written[key] = written_at, left_out + 1
            return None
        if len(self._written) >= _MAX_REMEMBERED:
            del self._written[next(iter(self._written))]
        self._written[key] = now, 0
        return left_out
