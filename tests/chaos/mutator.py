"""Changes the source: rotations, and everything that must not be taken for one."""

import collections
import random
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.content import Contents
from tests.chaos.files import ChaosFile, Ciphertexts
from tests.chaos.table import FileRow, Table

# Means and bounds in seconds.
_PAUSE_S = 0.12
_MENDED_AFTER_S = (0.05, 2.5)
_HALF_WRITTEN_S = (0.0, 0.04)


@dataclass(frozen=True)
class _Mend:
    """What sets something right again, and when."""

    at: float
    mend: Callable[[], None]
    files: tuple[ChaosFile, ...]


class Mutator:
    """Changes files at random, one after the other, and keeps the table true.

    Args:
        mountpoint: where the files are served, to be sure that a version was seen.
        seen_at_open: whether the view shows a change from the next open on; else a floor rises
            only when somebody else has seen the new version.
        rollback_guard: held while an older version lies in place of one that was seen. What
            makes a mount forget which it has seen must not happen meanwhile.
    """

    def __init__(
        self,
        files: list[ChaosFile],
        ciphertexts: Ciphertexts,
        table: Table,
        mountpoint: Path,
        *,
        seed: str,
        seen_at_open: bool,
        rollback_guard: threading.Lock,
    ) -> None:
        self._files = files
        self._ciphertexts = ciphertexts
        self._table = table
        self._mountpoint = mountpoint
        self._contents = Contents([file.base_bytes for file in files])
        self._chance = random.Random(seed)
        self._seen_at_open = seen_at_open
        self._rollback_guard = rollback_guard
        self._mends: list[_Mend] = []
        self._pause = select.poll()
        self.done: collections.Counter[str] = collections.Counter()

    def fill(self) -> None:
        """Put the first version of every file in place."""
        for file in self._files:
            self._rotate(file)

    def rotate_some(self) -> None:
        """Put a new version of a quarter of the files in place."""
        for file in self._chance.sample(self._files, len(self._files) // 4):
            self._rotate(file)

    def run(self, ends_at: float) -> None:
        """Change until a moment (of time.monotonic), then set everything right."""
        ways: dict[Callable[[ChaosFile], None], int] = {
            self._rotate: 45,
            self._rewrite: 12,
            self._rewrite_in_part: 6,
            self._remove: 8,
            self._swap: 10,
            self._roll_back: 12,
            self._damage: 6,
            self._put_foreign: 5,
        }
        while time.monotonic() < ends_at:
            busy = {file for mend in self._mends for file in mend.files}
            file = self._chance.choice([file for file in self._files if file not in busy])
            (way,) = self._chance.choices(list(ways), list(ways.values()))
            way(file)
            self._rest(self._chance.expovariate(1 / _PAUSE_S))
            self._mend_until(time.monotonic())
        self._mend_until(float("inf"))

    # --- right ways to change a file -------------------------------------------------------------

    def _rotate(self, file: ChaosFile) -> None:
        """A new version, by rename."""
        version, ciphertext = self._next(file)
        self._ciphertexts.put(file, ciphertext)
        self._in_place(file, version, ciphertext)
        self.done["rotations"] += 1

    def _rewrite(self, file: ChaosFile) -> None:
        """A new version, written over the old one: for a moment there is half of each."""
        row = self._row(file)
        row.tampered.begin()
        version, ciphertext = self._next(file)
        half = self._chance.randrange(len(ciphertext))
        self._ciphertexts.write_part(file, ciphertext[:half], truncate=self._chance.random() < 0.5)
        self._rest(self._chance.uniform(*_HALF_WRITTEN_S))
        self._ciphertexts.write_in_place(file, ciphertext, start=half)
        self._in_place(file, version, ciphertext)
        row.tampered.end()
        self.done["rewrites in place"] += 1

    # --- wrong ones, set right later -------------------------------------------------------------

    def _rewrite_in_part(self, file: ChaosFile) -> None:
        """A new version is written over the old one, and its writer dies."""
        self._row(file).tampered.begin()
        _, ciphertext = self._next(file)
        self._ciphertexts.write_part(
            file,
            ciphertext[: self._chance.randrange(len(ciphertext))],
            truncate=self._chance.random() < 0.5,
        )
        self._mend_later(lambda: self._end_tampering(file), file)
        self.done["torn writes"] += 1

    def _remove(self, file: ChaosFile) -> None:
        """The file is away for a time, and comes back as it was or as a newer version."""
        row = self._row(file)
        row.absent.begin()
        self._ciphertexts.remove(file)

        def bring_back() -> None:
            if self._chance.random() < 0.5:
                self._ciphertexts.put(file, file.ciphertext)
            else:
                self._rotate(file)
            row.absent.end()

        self._mend_later(bring_back, file)
        self.done["removals"] += 1

    def _swap(self, file: ChaosFile) -> None:
        """Two files that are bound have each other's ciphertexts."""
        other = self._other_of(file, bound=True)
        if not file.bound or other is None:
            return
        for one in (file, other):
            self._row(one).tampered.begin()
        self._ciphertexts.put(file, other.ciphertext)
        self._ciphertexts.put(other, file.ciphertext)

        def unswap() -> None:
            self._end_tampering(file)
            self._end_tampering(other)

        self._mend_later(unswap, file, other)
        self.done["swaps"] += 1

    def _put_foreign(self, file: ChaosFile) -> None:
        """A bare blob, which is authentic, lies where only what is bound may."""
        other = self._other_of(file, bound=False)
        if file.bound and other is not None:
            self._tamper(file, other.ciphertext)
            self.done["foreign blobs"] += 1

    def _damage(self, file: ChaosFile) -> None:
        """One bit is another."""
        damaged = bytearray(file.ciphertext)
        damaged[self._chance.randrange(len(damaged))] ^= 1 << self._chance.randrange(8)
        self._tamper(file, bytes(damaged))
        self.done["damages"] += 1

    def _roll_back(self, file: ChaosFile) -> None:
        """An older version lies in place of one that the mount has seen, then a newer one."""
        if not (file.bound and file.older and self._rollback_guard.acquire(blocking=False)):
            return
        if not self._has_been_seen(file):
            self._rollback_guard.release()
            return
        self._row(file).tampered.begin()
        self._ciphertexts.put(file, self._chance.choice(file.older))

        def replace() -> None:
            self._rotate(file)
            self._row(file).tampered.end()
            self._rollback_guard.release()

        self._mend_later(replace, file)
        self.done["rollbacks"] += 1

    # --- helpers ---------------------------------------------------------------------------------

    def _row(self, file: ChaosFile) -> FileRow:
        return self._table.files[file.index]

    def _next(self, file: ChaosFile) -> tuple[int, bytes]:
        """The next version, announced, and its ciphertext."""
        row = self._row(file)
        row.newest += 1
        return row.newest, file.encrypt(row.newest)

    def _in_place(self, file: ChaosFile, version: int, ciphertext: bytes) -> None:
        if file.ciphertext:
            file.older.append(file.ciphertext)
        file.version, file.ciphertext = version, ciphertext
        if self._seen_at_open:
            self._row(file).floor = version

    def _other_of(self, file: ChaosFile, *, bound: bool) -> ChaosFile | None:
        busy = {one for mend in self._mends for one in mend.files}
        others = [f for f in self._files if f.bound == bound and f is not file and f not in busy]
        return self._chance.choice(others) if others else None

    def _tamper(self, file: ChaosFile, ciphertext: bytes) -> None:
        self._row(file).tampered.begin()
        self._ciphertexts.put(file, ciphertext)
        self._mend_later(lambda: self._end_tampering(file), file)

    def _end_tampering(self, file: ChaosFile) -> None:
        """Put the file back as it was, or a newer version."""
        if self._chance.random() < 0.5:
            self._ciphertexts.put(file, file.ciphertext)
        else:
            self._rotate(file)
        self._row(file).tampered.end()

    def _has_been_seen(self, file: ChaosFile) -> bool:
        """Whether the mount serves the version that is in place: it has seen it then."""
        try:
            read = (self._mountpoint / file.name).read_bytes()
        except OSError:
            return False
        return read == self._contents.of(file.index, file.version)

    def _mend_later(self, mend: Callable[[], None], *files: ChaosFile) -> None:
        at = time.monotonic() + self._chance.uniform(*_MENDED_AFTER_S)
        self._mends.append(_Mend(at, mend, files))

    def _mend_until(self, moment: float) -> None:
        due = [mend for mend in self._mends if mend.at <= moment]
        self._mends = [mend for mend in self._mends if mend.at > moment]
        for mend in due:
            mend.mend()

    def _rest(self, seconds: float) -> None:
        self._pause.poll(seconds * 1000)
