"""A circuit breaker for each key: while KMS is away for one, opens fail at once but for a probe.

What counts as one key is the caller's word for it; the ARN in it names the region, so that a
region that is away leaves the keys of others alone. Not thread-safe.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from kmsfs.errors import (
    CredentialsUnavailable,
    DeadlineExceeded,
    ExitCode,
    KeyNotAllowed,
    KmsAnswerInvalid,
    KmsfsError,
    KmsUnreachable,
    WorkerFailed,
)
from kmsfs.events import BreakerClosed, BreakerOpened, EventSink

# In a row. One may be a lost packet, two a server that was being replaced.
FAILURES_TO_OPEN: Final = 3

# Between the end of a probe and the next one: at first, then twice as much each time, and at
# most; times a random number below 1, so that a fleet does not come back all at once.
FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 0.75

# What a probe may take. Together with a pause this is how long a KMS that has come back may go
# unnoticed. A first attempt gets six tenths of it, see `client`.
PROBE_S: Final = 2.0

# After so many probes in a row that took too long, one may take as long as any open: KMS or the
# source of credentials may be slow and not away, and has to get a chance to show it.
HASTY_PROBES: Final = 7

# What an error tells of the time of the next probe while one is under way.
_WHILE_PROBING_S: Final = 0.1


def kms_is_away(error: KmsfsError) -> bool:
    """Whether KMS gave no answer, as against one that says no.

    Credentials that are missing or refused are among it. To look for them can take as long as
    KMS, and they may be there at the next moment.
    """
    return isinstance(error, KmsUnreachable | CredentialsUnavailable)


def is_failure(error: KmsfsError) -> bool:
    """Whether an error is no verdict on a file or its key: what was decrypted before may stand.

    KMS is away, something in its place answered nonsense, or our own process was lost.
    """
    return kms_is_away(error) or isinstance(error, KmsAnswerInvalid | WorkerFailed)


def kms_has_refused(error: KmsfsError) -> bool:
    """Whether KMS answered, and its answer is no."""
    return error.exit_code is ExitCode.REFUSED_BY_KMS and not isinstance(error, KeyNotAllowed)


@dataclass(frozen=True, slots=True)
class OpenBreaker:
    """A key that KMS is away for. Times are in seconds.

    Attributes:
        failures: how many calls failed in a row.
        open_for_s: how long it has been open.
        again_in_s: when the next probe may begin; 0 where one may or has begun.
        error: how the last call failed.
    """

    key: str
    failures: int
    open_for_s: float
    again_in_s: float
    error: KmsfsError


@dataclass(eq=False, slots=True)
class _Breaker:
    """What is known of one key; `opened_at` is None while it is closed."""

    answered_at: float = float("-inf")
    failures: int = 0
    hasty: int = 0
    pauses: int = 0
    error: KmsfsError | None = None
    opened_at: float | None = None
    again_at: float = 0.0
    probe: "Attempt | None" = None


class Attempt:
    """One open's way to KMS. Made by `Breakers.attempt`."""

    __slots__ = ("_begin", "begun_at", "entered_at", "key")

    def __init__(self, key: str, entered_at: float, begin: Callable[["Attempt"], float]) -> None:
        self.key: Final = key
        self.entered_at: Final = entered_at
        self.begun_at: float | None = None
        self._begin = begin

    def begin(self) -> float:
        """Its turn to ask KMS has come; returns the moment by which it must have ended.

        Raises:
            KmsUnreachable, CredentialsUnavailable: the breaker has opened meanwhile.
        """
        return self._begin(self)


class Breakers:
    """The breakers of all keys.

    A breaker opens when `FAILURES_TO_OPEN` calls in a row found KMS away. It is closed by any
    answer of KMS, a refusal included. What says nothing of KMS (a bad file, a lost worker, a call
    that was cancelled, or began before KMS last answered) changes nothing.

    Args:
        clock: the present, in seconds.
        dice: a random number from 0 to below 1.
        events: told when one opens or closes.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        events: EventSink,
        *,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._dice = dice
        self._events = events
        self._breakers: dict[str, _Breaker] = {}

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator[Attempt]:
        """Around everything that an open does to have a file decrypted; how it ends is noted.

        Raises:
            KmsUnreachable, CredentialsUnavailable: the breaker is open, and this is not its
                probe. Of the class of the last failure, with `again_in_s`.
        Cancellation: the next open may be the probe.
        """
        attempt = Attempt(key, self._clock(), self._begin)
        self._admit(attempt)
        try:
            yield attempt
        except KmsfsError as error:
            self._note(attempt, error)
            raise
        else:
            self._answered(attempt.key)
        finally:
            breaker = self._breakers.get(key)
            if breaker is not None and breaker.probe is attempt:
                breaker.probe = None

    def open_breakers(self) -> list[OpenBreaker]:
        """Those that are open now, by key."""
        now = self._clock()
        return [
            OpenBreaker(
                key=key,
                failures=breaker.failures,
                open_for_s=now - breaker.opened_at,
                again_in_s=0.0 if breaker.probe else max(0.0, breaker.again_at - now),
                error=breaker.error,
            )
            for key, breaker in sorted(self._breakers.items())
            if breaker.opened_at is not None and breaker.error is not None
        ]

    def close_all(self) -> None:
        """Forget everything: whoever unlocks a volume wants KMS to be asked."""
        self._breakers.clear()

    def _begin(self, attempt: Attempt) -> float:
        breaker = self._admit(attempt)
        now = attempt.begun_at = self._clock()
        if breaker is None or breaker.probe is not attempt or breaker.hasty >= HASTY_PROBES:
            return float("inf")
        return now + PROBE_S

    def _admit(self, attempt: Attempt) -> _Breaker | None:
        breaker = self._breakers.get(attempt.key)
        if breaker is None or breaker.opened_at is None or breaker.probe is attempt:
            return breaker
        now = self._clock()
        if breaker.probe is not None:
            raise _not_asked(breaker, _WHILE_PROBING_S, "is being tried")
        if now < breaker.again_at:
            pause_s = breaker.again_at - now
            raise _not_asked(breaker, pause_s, f"is tried again in {pause_s:.1f} s")
        breaker.probe = attempt
        return breaker

    def _note(self, attempt: Attempt, error: KmsfsError) -> None:
        now = self._clock()
        if kms_has_refused(error):
            self._answered(attempt.key)
            return
        begun_at = attempt.begun_at
        if begun_at is None or not kms_is_away(error) or error.again_in_s is not None:
            return
        waited_s, asked_s = begun_at - attempt.entered_at, now - begun_at
        if isinstance(error, DeadlineExceeded) and asked_s < waited_s:
            # Its time went by behind other calls.
            return
        breaker = self._breakers.setdefault(attempt.key, _Breaker())
        if begun_at < breaker.answered_at:
            return
        breaker.failures += 1
        if breaker.opened_at is None:
            breaker.error = error
            if breaker.failures >= FAILURES_TO_OPEN:
                breaker.opened_at = now
                self._pause(breaker, now)
                self._events.emit(BreakerOpened(attempt.key, error.code, error.detail))
        elif breaker.probe is attempt:
            breaker.error = error
            patient = breaker.hasty >= HASTY_PROBES
            late = isinstance(error, DeadlineExceeded)
            breaker.hasty = breaker.hasty + 1 if late and not patient else 0
            self._pause(breaker, now)

    def _pause(self, breaker: _Breaker, now: float) -> None:
        bound_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0**breaker.pauses)
        if bound_s < MAX_PAUSE_S:
            breaker.pauses += 1
        breaker.again_at = now + bound_s * self._dice()

    def _answered(self, key: str) -> None:
        now = self._clock()
        before = self._breakers.get(key)
        self._breakers[key] = _Breaker(answered_at=now)
        if before is not None and before.opened_at is not None:
            self._events.emit(BreakerClosed(key, now - before.opened_at))


def _not_asked(breaker: _Breaker, again_in_s: float, when: str) -> KmsfsError:
    last = breaker.error
    assert last is not None, "an open breaker has an error"
    error = type(last)(
        f"not asked: KMS {when}, after {breaker.failures} failures in a row: {last.detail}",
        hint=last.hint,
    )
    error.again_in_s, error.call = again_in_s, last.call
    return error
