"""What is in place now: numbers shared by all processes of a run, without locks.

Every number has one writer, is written whole, and is written in an order that never makes a
right read look wrong: what is about to be written is announced before, what is in place after.
"""

import mmap
import time
from pathlib import Path
from typing import Final

_HEADER_WORDS: Final = 32
_FILE_WORDS: Final = 8
_WORD_BYTES: Final = 8

_STOP, _CALM, _LOCK, _DAEMON, _KMS = 0, 1, 4, 8, 12
_NEWEST, _FLOOR, _TAMPER, _ABSENT = 0, 1, 2, 5


class Window:
    """Times at which something is the case; one process begins and ends them.

    Whoever reads takes `mark` before, and asks `overlaps` of it afterwards.
    """

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at

    def begin(self) -> None:
        """From now on it may be the case."""
        self._words[self._at] += 1

    def end(self) -> None:
        """It is over. Every `begin` has one."""
        self._words[self._at + 2] = time.monotonic_ns()
        self._words[self._at + 1] += 1

    def mark(self) -> int:
        """The present, for `overlaps`."""
        return int(self._words[self._at + 1])

    def overlaps(self, mark: int, grace_s: float = 0.0) -> bool:
        """Whether it was the case at any time since the mark, or so long before now."""
        if self._words[self._at] != mark:
            return True
        return bool(grace_s) and mark > 0 and (
            time.monotonic_ns() - self._words[self._at + 2] < grace_s * 1e9
        )  # fmt: skip


class FileRow:
    """What is known of one file."""

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._newest = at + _NEWEST
        self._floor = at + _FLOOR
        self.tampered: Final = Window(words, at + _TAMPER)
        self.absent: Final = Window(words, at + _ABSENT)

    @property
    def newest(self) -> int:
        """The newest version that was begun to be written: none that is newer can be read."""
        return int(self._words[self._newest])

    @newest.setter
    def newest(self, version: int) -> None:
        self._words[self._newest] = version

    @property
    def floor(self) -> int:
        """No open that begins now may give an older version."""
        return int(self._words[self._floor])

    @floor.setter
    def floor(self, version: int) -> None:
        self._words[self._floor] = version


class Table:
    """The numbers of a run.

    Args:
        path: of the file that is shared, which `create` makes.

    Attributes:
        lock: while the volume may be locked.
        daemon: while the daemon may be dead, or another not yet in its place.
        kms: while KMS may be away or refuse.
        files: by index.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("Q")
        self.lock: Final = Window(self._words, _LOCK)
        self.daemon: Final = Window(self._words, _DAEMON)
        self.kms: Final = Window(self._words, _KMS)
        count = (len(self._words) - _HEADER_WORDS) // _FILE_WORDS
        self.files: Final = [
            FileRow(self._words, _HEADER_WORDS + number * _FILE_WORDS) for number in range(count)
        ]

    @staticmethod
    def create(path: Path, files: int) -> "Table":
        """A new one, all zeros."""
        path.write_bytes(bytes((_HEADER_WORDS + files * _FILE_WORDS) * _WORD_BYTES))
        return Table(path)

    @property
    def stopping(self) -> bool:
        """Whether the readers are to end."""
        return bool(self._words[_STOP])

    def stop(self) -> None:
        """Have the readers end."""
        self._words[_STOP] = 1

    @property
    def calm(self) -> int:
        """Odd while nothing is the matter and nothing changes, so that no open may fail; another
        number each time."""
        return int(self._words[_CALM])

    def change_calm(self) -> None:
        """Begin or end a calm."""
        self._words[_CALM] += 1
