"""A process that reads all the time, and checks every byte. `python -m tests.chaos.reader JSON`.

It ends when the table says so, and prints what it met as JSON.
"""

import collections
import contextlib
import errno
import json
import math
import mmap
import os
import random
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.check import Piece, WrongError, versions_of
from tests.chaos.content import Contents
from tests.chaos.errnos import Moment, is_allowed, is_calm_since
from tests.chaos.table import Table

# More than any file has.
_WHOLE_BYTES = 1 << 18

# How often each of the ways to read is taken: whole, pieces, stream, mapped.
_WEIGHTS = (70, 12, 5, 5)

# So many reads lie between two looks at the descriptors that are held.
_IN_A_ROW = 25

# Descriptors held open across whatever happens, and how likely one is closed after a read.
_HELD = 6
_HELD_ENDS = 0.01

# After an error, so that a mount that is away does not take all of the processor.
_PAUSE_MS = 3

_MAX_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class ReaderJob:
    """What a reader is told.

    Attributes:
        open_within_s: every open ends within this.
        names: of the files, by index.
        base_sizes: of their plaintexts.
        at_most: ends after about so many reads.
    """

    table: str
    mountpoint: str
    view: str
    seed: str
    open_within_s: float
    names: list[str]
    base_sizes: list[int]
    at_most: float = math.inf


@dataclass
class Tally:
    """What a reader met.

    Attributes:
        reads: checked, or ended by an error.
        errors: by the name of the errno, how often.
        slowest_open_s: the longest that an open took.
        problems: what must not be, in words.
        wrong: how many reads gave wrong bytes.
    """

    reads: int = 0
    successes: int = 0
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest_open_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    wrong: int = 0

    def note_problem(self, text: str) -> None:
        """Keep it, if it is among the first."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def as_json(self) -> dict[str, Any]:
        """For the process that started this one."""
        return {**vars(self), "errors": dict(self.errors)}

    def add(self, other: dict[str, Any]) -> None:
        """Take in what another says `as_json`."""
        self.reads += other["reads"]
        self.successes += other["successes"]
        self.errors.update(other["errors"])
        self.slowest_open_s = max(self.slowest_open_s, other["slowest_open_s"])
        self.problems += other["problems"]
        self.wrong += other["wrong"]


class OpenFile:
    """One descriptor: it gives one and the same version for as long as it is open.

    Args:
        moment: before the open.
    """

    def __init__(self, reader: "Reader", index: int, moment: Moment) -> None:
        self._reader = reader
        self.index = index
        self.moment = moment
        row = reader.table.files[index]
        lowest = max(row.floor, reader.seen[index])
        started = time.monotonic()
        try:
            self.fd = os.open(reader.paths[index], os.O_RDONLY | os.O_CLOEXEC)
        finally:
            reader.note_open(index, time.monotonic() - started)
        # What one descriptor gave once, it has to give ever after.
        self._valid: range | frozenset[int] = range(lowest, row.newest + 1)

    def pread(self, size_bytes: int, offset: int) -> None:
        """Read a piece and check it."""
        self.check(Piece(self.index, offset, size_bytes, os.pread(self.fd, size_bytes, offset)))

    def check(self, piece: Piece) -> None:
        """Check a piece of it, however it was read.

        Raises:
            WrongError: it is wrong.
        """
        self._valid = versions_of(self._reader.contents, piece, self._valid)
        self._reader.seen[self.index] = max(self._reader.seen[self.index], min(self._valid))
        self._reader.tally.reads += 1
        self._reader.tally.successes += 1

    def close(self) -> None:
        """Give the descriptor back; what is unmounted has nobody to tell of it."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Reader:
    """Reads in random ways until it is told to stop."""

    def __init__(self, job: ReaderJob) -> None:
        self._job = job
        self._chance = random.Random(job.seed)
        self.table = Table(Path(job.table))
        self.contents = Contents(job.base_sizes)
        self.paths = [os.path.join(job.mountpoint, name) for name in job.names]
        # By index, the newest version that an open gave which had ended before the next began.
        self.seen = [0] * len(job.names)
        self.tally = Tally()
        self._held: list[OpenFile] = []
        self._scratch_fd = os.memfd_create("map")
        self._pause = select.poll()

    def run(self) -> Tally:
        """Until the table says stop, or it is enough."""
        ways = [self._whole, self._pieces, self._stream, self._mapped]
        indexes = range(len(self.paths))
        while not self.table.stopping and self.tally.reads < self._job.at_most:
            for way in self._chance.choices(ways, _WEIGHTS, k=_IN_A_ROW):
                self._read_one(self._chance.choice(indexes), way)
            self._read_held()
        for held in self._held:
            held.close()
        return self.tally

    def note_open(self, index: int, elapsed_s: float) -> None:
        """An open has ended, one way or another."""
        self.tally.slowest_open_s = max(self.tally.slowest_open_s, elapsed_s)
        if elapsed_s > self._job.open_within_s:
            self.tally.note_problem(f"late: an open of file {index} took {elapsed_s:.1f} s")

    def _read_one(self, index: int, way: Callable[[OpenFile], None]) -> None:
        moment = Moment.of(self.table, index)
        try:
            file = OpenFile(self, index, moment)
            try:
                way(file)
            finally:
                file.close()
        except (OSError, WrongError) as error:
            self._note_failure(error, index, moment)

    def _read_held(self) -> None:
        """Read again all that were opened some time ago, and open others for those that end."""
        for file in list(self._held):
            try:
                file.pread(self._chance.choice((_WHOLE_BYTES, 4096)), 0)
                ended = self._chance.random() < _HELD_ENDS
            except (OSError, WrongError) as error:
                self._note_failure(error, file.index, file.moment)
                ended = True
            if ended:
                self._held.remove(file)
                file.close()
        if len(self._held) < _HELD:
            index = self._chance.randrange(len(self.paths))
            moment = Moment.of(self.table, index)
            try:
                self._held.append(OpenFile(self, index, moment))
            except OSError as error:
                self._note_failure(error, index, moment)

    # --- ways to read ----------------------------------------------------------------------------

    def _whole(self, file: OpenFile) -> None:
        """open, read, close: as most programs do."""
        file.pread(_WHOLE_BYTES, 0)

    def _pieces(self, file: OpenFile) -> None:
        """Small ones from anywhere, now and then beyond the end."""
        span = self._job.base_sizes[file.index] * 9 // 8 + 64
        for _ in range(self._chance.randrange(2, 20)):
            size_bytes = self._chance.choice((1, 80, 512, 4096, 5000, 32768))
            file.pread(size_bytes, self._chance.randrange(span))

    def _stream(self, file: OpenFile) -> None:
        """From the beginning to the end in small steps."""
        step = self._chance.choice((1024, 4096, 10000, 65536))
        offset = 0
        while True:
            data = os.read(file.fd, step)
            file.check(Piece(file.index, offset, step, data))
            offset += len(data)
            if len(data) < step:
                break

    def _mapped(self, file: OpenFile) -> None:
        """Through a private map of as much as the file says it has.

        What would be SIGBUS for who touches the map is EFAULT for who has the kernel do it.
        """
        size_bytes = os.fstat(file.fd).st_size
        if size_bytes == 0:
            raise WrongError("cut", f"file {file.index} says that it is empty")
        with mmap.mmap(file.fd, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            copied = 0
            while copied < size_bytes:
                with memoryview(mapped) as view, view[copied:] as rest:
                    copied += os.pwrite(self._scratch_fd, rest, copied)
        data = os.pread(self._scratch_fd, size_bytes, 0)
        # One byte more than it says must not be there either.
        file.check(Piece(file.index, 0, size_bytes + 1, data))

    # --- what comes of it ------------------------------------------------------------------------

    def _note_failure(self, error: OSError | WrongError, index: int, moment: Moment) -> None:
        self.tally.reads += 1
        if isinstance(error, WrongError):
            self.tally.wrong += 1
            self.tally.note_problem(f"wrong bytes: {error}")
            return
        number = error.errno or 0
        name = errno.errorcode.get(number, str(number))
        self.tally.errors[name] += 1
        if not is_allowed(number, moment, self.table, index, self._job.view):
            when = "in a calm" if is_calm_since(moment, self.table) else "with nothing to cause it"
            self.tally.note_problem(f"errno: {name} of file {index}, {when}")
        self._pause.poll(_PAUSE_MS)


def main(text: str) -> None:
    """Read as a job in JSON says."""
    tally = Reader(ReaderJob(**json.loads(text))).run()
    print(json.dumps(tally.as_json()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
