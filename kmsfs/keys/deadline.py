"""An end for blocking calls that have no end of their own.

Timeouts of a connection bound the silence between two bytes, not the whole; a credential process
or a metadata service has none at all. So the main thread, where workers and commands make their
calls, is interrupted by a timer signal. Elsewhere only `check` holds, between two attempts.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Final

from kmsfs.errors import DeadlineExceeded

# What is raised in a destructor is swallowed by the interpreter, so it is raised again.
_REPEAT_S: Final = 0.1

_ends_at: ContextVar[float | None] = ContextVar("_ends_at", default=None)


class _TimeUp(BaseException):
    """Not an Exception: libraries that catch those must let it pass."""


def check() -> None:
    """Raise where the time of the `limit` around this call is up.

    Raises:
        DeadlineExceeded: it is.
    """
    ends_at = _ends_at.get()
    if ends_at is not None and time.monotonic() >= ends_at:
        raise DeadlineExceeded("no answer from KMS within the deadline")


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """End what runs inside after `seconds`; not to be nested.

    In the main thread this uses SIGALRM and the real-time timer, and leaves both as they were.
    What was interrupted is in an unknown state: connections and sessions are to be dropped, and
    a program that was to give credentials lives on. A name server that does not answer is
    outlasted, not interrupted.

    Raises:
        DeadlineExceeded: the time was up; at once where `seconds` is not positive.
    """
    if seconds <= 0:
        raise DeadlineExceeded("no time was left to ask KMS")
    late = DeadlineExceeded(f"no answer from KMS within {seconds:.3g} s")
    token = _ends_at.set(time.monotonic() + seconds)
    try:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        armed = True

        def ring(_signal: int, _frame: FrameType | None) -> None:
            if armed:
                raise _TimeUp

        hook_before = sys.unraisablehook

        def swallowed(raised: "sys.UnraisableHookArgs") -> None:
            if raised.exc_type is not _TimeUp:
                hook_before(raised)

        handler_before = signal.signal(signal.SIGALRM, ring)
        sys.unraisablehook = swallowed
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_S)
            yield
        except _TimeUp:
            raise late from None
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler_before)
            sys.unraisablehook = hook_before
    finally:
        _ends_at.reset(token)
