"""Whether a volume is locked, kept where it outlives the daemon: a killed one's successor is too.

The mark is one byte in memory that the launcher holds and hands to every daemon. It is there
from the moment it is written, however the daemon ends.
"""

import os
from typing import Final

_LOCKED: Final = b"\1"
_UNLOCKED: Final = b"\0"


class LockMark:
    """The mark of one mount.

    Args:
        fd: of the launcher's memory; the mark's from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def is_set(self) -> bool:
        """Whether the last daemon that wrote it was locked; false before the first."""
        return os.pread(self._fd, 1, 0) == _LOCKED

    def set(self, *, locked: bool) -> None:
        """Write it."""
        os.pwrite(self._fd, _LOCKED if locked else _UNLOCKED, 0)
