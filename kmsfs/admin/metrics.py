"""Counts what happens in a mount, in the daemon, which lives long: with plain numbers."""

from typing import Final

from kmsfs.admin.status import Counters
from kmsfs.events import (
    BreakerOpened,
    Decrypted,
    DecryptFailed,
    Event,
    Opened,
    OpenRefused,
    Published,
    Wiped,
    WorkerEnded,
)

MAX_LABELS: Final = 64
"""Different errors or reasons that are told apart; all further ones count as `OTHER`.

There are fewer in kmsfs: whatever a name should come from, memory and time series stay bounded.
"""

OTHER: Final = "other"


class _ByLabel:
    """A number for each label."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, label: str) -> None:
        """Count one more."""
        if label not in self._counts and len(self._counts) >= MAX_LABELS:
            label = OTHER
        self._counts[label] = self._counts.get(label, 0) + 1

    def now(self) -> dict[str, int]:
        """A copy."""
        return dict(self._counts)


class Metrics:
    """EventSink that counts. It never fails, so that no reader is refused for its sake."""

    def __init__(self) -> None:
        self._opens_from_memory = 0
        self._opens_after_decryption = 0
        self._opens_stale = 0
        self._opens_refused = _ByLabel()
        self._decryptions = 0
        self._decryption_s = 0.0
        self._decrypted_bytes = 0
        self._decryptions_failed = _ByLabel()
        self._wiped = _ByLabel()
        self._workers_lost = 0
        self._breakers_opened = 0
        self._published = 0

    @property
    def counters(self) -> Counters:
        """The numbers as they are now."""
        return Counters(
            opens_from_memory=self._opens_from_memory,
            opens_after_decryption=self._opens_after_decryption,
            opens_stale=self._opens_stale,
            opens_refused=self._opens_refused.now(),
            decryptions=self._decryptions,
            decryption_s=self._decryption_s,
            decrypted_bytes=self._decrypted_bytes,
            decryptions_failed=self._decryptions_failed.now(),
            wiped=self._wiped.now(),
            workers_lost=self._workers_lost,
            breakers_opened=self._breakers_opened,
            published=self._published,
        )

    def emit(self, event: Event) -> None:
        """Count `event`, if it is of a kind that is counted."""
        match event:
            case Opened(stale=True):
                self._opens_stale += 1
            case Opened(from_cache=True):
                self._opens_from_memory += 1
            case Opened():
                self._opens_after_decryption += 1
            case OpenRefused():
                self._opens_refused.add(event.error)
            case Decrypted():
                self._decryptions += 1
                self._decryption_s += event.duration_s
                self._decrypted_bytes += event.size_bytes
            case DecryptFailed():
                self._decryptions_failed.add(event.error)
            case Wiped():
                self._wiped.add(event.reason)
            case WorkerEnded():
                self._workers_lost += 1
            case BreakerOpened():
                self._breakers_opened += 1
            case Published():
                self._published += 1
            case _:
                # What else happens shows in `status` for as long as it lasts.
                pass
