"""What one fault of the matrix is: how it is made, what is promised for it, how it ends."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from tests.fault.matrix.stage import Scene


class Shown(enum.Enum):
    """What a ramfs shows of the file that a fault struck."""

    KEPT = "the version before"
    ABSENT = "not there"
    SERVED = "the new version"


class Spared(enum.Enum):
    """What else goes on being served while a fault lasts, in the FUSE view."""

    EVERYTHING = "everything else"
    IN_MEMORY = "what is in memory"
    NOTHING = "nothing"


def _nothing(_scene: Scene) -> None:
    """Where there is nothing to do."""


def _as_it_is(_scene: Scene, ciphertext: bytes) -> bytes:
    return ciphertext


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. A file is served; then `strike`; then a new version of it takes its place.

    Attributes:
        name: of the row in the table.
        errno: what opening the new version gives in the FUSE view; empty where it is read.
        reason: the error that `kmsfs status` and `why` name; empty where there is none, None where
            status cannot be asked.
        ramfs: what the ramfs view shows of it.
        spared: what else is served.
        strike: makes the fault.
        alter: what takes the new ciphertext's place, where that is the fault.
        put: how it is put there, if not by rename; gets the altered ciphertext.
        mend: ends the fault. Where that is a matter of the ciphertext, and this does nothing, the
            new version as it should be is put in its place.
        size_bytes: of the new version.
            unbound: the file need not be bound.
        stalling: the source must be able to stall.
        views: that it applies to.
    """

    name: str
    errno: str
    reason: str | None
    ramfs: Shown
    spared: Spared = Spared.EVERYTHING
    strike: Callable[[Scene], None] = _nothing
    alter: Callable[[Scene, bytes], bytes] = _as_it_is
    put: Callable[[Scene, bytes], None] = Scene.put
    mend: Callable[[Scene], None] = _nothing
    size_bytes: int = 3000
    unbound: bool = False
    stalling: bool = False
    views: tuple[str, ...] = ("fuse", "ramfs")

    @property
    def good_is_to_be_put(self) -> bool:
        """Whether mending is to put the new version as it should be in its place."""
        other = self.alter is not _as_it_is or self.put is not Scene.put
        return other and self.mend is _nothing


@dataclass(frozen=True)
class Group:
    """Faults of one kind, in the order of the table."""

    title: str
    faults: tuple[Fault, ...]
