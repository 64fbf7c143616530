"""What happens in a mount, as frozen records. Never content.

Emitters know only the `EventSink` protocol; who listens (log, audit, metrics) is decided where
the process is composed.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Decrypted:
    """A file's plaintext arrived in locked memory."""

    path: str
    size_bytes: int
    duration_s: float
    key_id: str
    format: str


@dataclass(frozen=True, slots=True)
class DecryptFailed:
    """A file could not be decrypted; every waiting reader got `error`'s errno."""

    path: str
    error: str
    detail: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Opened:
    """A program opened a file; emitted before it has the descriptor.

    Attributes:
        stale: served past its time, since KMS could not be asked again.
        age_s: how long ago the plaintext was decrypted.
    """

    path: str
    uid: int
    gid: int
    pid: int
    from_cache: bool
    stale: bool = False
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """A program's open of a file failed."""

    path: str
    uid: int
    gid: int
    pid: int
    error: str


@dataclass(frozen=True, slots=True)
class Wiped:
    """A plaintext was overwritten in place and its memory returned."""

    path: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class LockChanged:
    """The volume was locked or unlocked."""

    locked: bool
    by_uid: int


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A decrypting process ended in the middle of a request."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class BreakerOpened:
    """KMS is away for a key: opens fail at once from now on, but for a probe at a time."""

    key: str
    error: str
    detail: str


@dataclass(frozen=True, slots=True)
class BreakerClosed:
    """KMS answers again for a key."""

    key: str
    open_for_s: float


@dataclass(frozen=True, slots=True)
class Published:
    """The ramfs shows a new set of files. Numbers of files, but for `size_bytes`."""

    files: int
    size_bytes: int
    added: int
    changed: int
    removed: int
    failed: int


@dataclass(frozen=True, slots=True)
class NotShown:
    """A file of the source is not in the ramfs, or not any more, and why."""

    path: str
    error: str
    detail: str


@dataclass(frozen=True, slots=True)
class PublishHeldBack:
    """A new set of files was not published, or not all of it; what was there before stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class ConfinementWeak:
    """Something is open to a process that should not be; see `SandboxReport.gaps`."""

    process: str
    gaps: tuple[str, ...]


Event = (
    Decrypted
    | DecryptFailed
    | Opened
    | OpenRefused
    | Wiped
    | LockChanged
    | WorkerEnded
    | BreakerOpened
    | BreakerClosed
    | Published
    | NotShown
    | PublishHeldBack
    | ConfinementWeak
)


class EventSink(Protocol):
    """Receives every event, in order, on the emitter's thread."""

    def emit(self, event: Event) -> None:
        """Take note of `event`. Must neither block nor raise."""
