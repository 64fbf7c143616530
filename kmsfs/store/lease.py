"""A plaintext held in its slot, and the right to read it."""

from collections.abc import Callable
from dataclasses import dataclass

from kmsfs.errors import VolumeLocked
from kmsfs.memory.arena import Slot
from kmsfs.memory.mapping import LockedMapping
from kmsfs.store.ciphertext import FileVersion


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One plaintext held now.

    Attributes:
        current: whether the next open may be served from it.
        stale: whether that open asks KMS first, its time being over.
    """

    path: str
    size_bytes: int
    age_s: float
    leases: int
    current: bool
    stale: bool


@dataclass(eq=False, slots=True)
class Entry:
    """One version of one file's plaintext. Times are trio's clock.

    Attributes:
        ready_at: when it was decrypted.
        idle_from: when its last lease ended.
        leases: how many may read it now.
        current: whether new leases may be given.
        wiped: whether its slot is gone, leases or not.
    """

    path: str
    version: FileVersion
    slot: Slot
    ready_at: float
    idle_from: float
    leases: int = 0
    current: bool = True
    wiped: bool = False


class Lease:
    """The right to read one version of one plaintext until it is closed or the volume locked.

    Args:
        ended: told when the lease is closed.
    """

    __slots__ = ("_ended", "_entry")

    def __init__(self, entry: Entry, ended: Callable[[Entry], None]) -> None:
        self._ended = ended
        self._entry: Entry | None = entry
        entry.leases += 1

    @property
    def size_bytes(self) -> int:
        """Exact size of the plaintext."""
        return 0 if self._entry is None else self._entry.slot.size_bytes

    def copy_to(self, target: LockedMapping, offset: int, size_bytes: int) -> int:
        """Copy a range of the plaintext to the start of `target`; see `Slot.copy_to`.

        Raises:
            VolumeLocked: the volume was locked since this lease was given.
        """
        if self._entry is None or self._entry.wiped:
            raise VolumeLocked("the volume was locked after this file was opened")
        return self._entry.slot.copy_to(target, offset, size_bytes)

    def write_to(self, fd: int, offset: int, size_bytes: int) -> int:
        """Write a range of the plaintext to a file; see `Slot.write_to`.

        Raises:
            VolumeLocked: the volume was locked since this lease was given.
            OSError.
        """
        if self._entry is None or self._entry.wiped:
            raise VolumeLocked("the volume was locked after this file was opened")
        return self._entry.slot.write_to(fd, offset, size_bytes)

    def close(self) -> None:
        """Give the lease back; again is harmless."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._ended(entry)
