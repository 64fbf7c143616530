"""What the daemon and either view say to each other."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from kmsfs.errors import KmsfsError
from kmsfs.events import Opened

Ready = Callable[[dict[str, KmsfsError]], Awaitable[None]]
"""Awaited once, when programs can read; given the files that they cannot, with why not.

Raises KmsfsError where that is not to be borne.
"""

Progress = Callable[[int, int], None]
"""Told before that after each file: how many are done, and of how many."""


def no_progress(_done: int, _total: int) -> None:
    """A `Progress` that nobody is told of."""


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A plaintext that was taken away and cannot be wiped, since a program holds it.

    Attributes:
        path: the path it was served under.
        old_path: where it lies now, relative to the root of its filesystem.
    """

    path: str
    old_path: str


class Auditor(Protocol):
    """Records opens."""

    async def admit(self, event: Opened) -> None:
        """Record an open before the program has its descriptor.

        Raises:
            AuditFailed: it has to be recorded, and cannot be.
        """


class View(Protocol):
    """One way to serve a volume, as the daemon that composes it sees it."""

    async def serve(self, ready: Ready, progress: Progress) -> None:
        """Serve until the mount is gone or `stop` is called.

        Raises:
            KmsfsError: it cannot be served; also what `ready` raised.
        """

    async def after_lock(self) -> tuple[HeldFile, ...]:
        """Take away what programs could still read; the volume is locked already."""

    async def after_unlock(self) -> dict[str, KmsfsError]:
        """Give it back; returns the files that cannot be, with why not."""

    async def reread(self, place: str, *, accept_older: bool) -> dict[str, KmsfsError]:
        """Have KMS asked again for every file at or below a path.

        Args:
            place: relative to the mountpoint; empty for everything.
            accept_older: serve what lies there though a newer version was seen. All such files
                are decrypted now.

        Returns: files there that cannot be read, or not anew, with why not.
        Raises:
            KmsfsError: nothing could be read again.
        Cancellation: files that were not asked for again stay as they were.
        """

    async def detach(self) -> None:
        """The mount is gone from the tree; programs may still use it."""

    def stop(self) -> None:
        """Have `serve` return."""

    def close(self) -> None:
        """Give everything back that is not plaintext; what programs see stays as it is."""
