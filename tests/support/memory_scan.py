"""Reads the memory of a process from outside, as root, and tells where something lies in it."""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmsfs import libc
from tests.support.mounts import process_name

_CHUNK_BYTES = 8 << 20

# Beyond it the kernel maps a page of its own (vsyscall), which pread(2) has no offset for.
_USER_END = 1 << 63

# What reading a page says that is not backed, or that the kernel keeps to its process.
_NOT_THERE = (errno.EIO, errno.EFAULT)


@dataclass(frozen=True, slots=True)
class Range:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    name: str


@dataclass(frozen=True, slots=True)
class Hit:
    """Something that was looked for and is there; without the bytes around it."""

    form: str
    address: int
    range: Range

    def __str__(self) -> str:
        """Where it lies, for the message of a failed test."""
        return f"{self.form} at {self.address:#x} in {self.range.permissions} {self.range.name}"


@dataclass(frozen=True)
class Scan:
    """What was found in one process.

    Attributes:
        read_bytes: how much of its memory could be read.
        unreadable: names of ranges of which nothing could be read, though the process can.
    """

    pid: int
    process: str
    hits: Sequence[Hit]
    read_bytes: int
    unreadable: frozenset[str]

    def __repr__(self) -> str:
        """What a failed assertion shows."""
        shown = ", ".join(map(str, self.hits[:5]))
        return f"{self.process} ({self.pid}): {len(self.hits)} hits in {self.read_bytes} B: {shown}"

    def count(self) -> Counter[str]:
        """How often each form was found."""
        return Counter(hit.form for hit in self.hits)


def ranges_of(pid: int) -> list[Range]:
    """All mappings of a process; none once it is gone."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, _, _, _, *name = line.split(maxsplit=5)
            start, end = (int(text, 16) for text in span.split("-"))
            found.append(Range(start, end, permissions, name[0] if name else "anonymous"))
    return found


def scan(pid: int, forms: Mapping[str, bytes]) -> Scan:
    """Look for byte strings, under their names, in every readable mapping of a process.

    Raises:
        OSError: its memory cannot be opened, or it is gone.
    """
    hits: list[Hit] = []
    read_bytes = 0
    unreadable = set()
    overlap_bytes = max(map(len, forms.values())) - 1
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for found in ranges_of(pid):
            if "r" not in found.permissions or found.end > _USER_END:
                continue
            known = b""
            next_address = found.start
            readable = False
            for address, chunk in _chunks(fd, found):
                data = known + chunk if address == next_address else chunk
                first = address + len(chunk) - len(data)
                hits += [
                    Hit(name, first + at, found)
                    for name, form in forms.items()
                    # What lies in the overlap as a whole was found with the chunk before.
                    for at in positions(data, form)
                    if first + at + len(form) > address
                ]
                known = data[-overlap_bytes:]
                next_address = address + len(chunk)
                read_bytes += len(chunk)
                readable = True
            if not readable:
                unreadable.add(found.name)
    finally:
        os.close(fd)
    return Scan(pid, process_name(pid), hits, read_bytes, frozenset(unreadable))


def positions(data: bytes, form: bytes) -> Iterator[int]:
    """Where a byte string begins in others, overlapping ones included."""
    at = data.find(form)
    while at >= 0:
        yield at
        at = data.find(form, at + 1)


def _chunks(fd: int, found: Range) -> Iterator[tuple[int, bytes]]:
    """What can be read of a range, with the address of each piece."""
    address = found.start
    while address < found.end:
        try:
            chunk = os.pread(fd, min(_CHUNK_BYTES, found.end - address), address)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            chunk = b""
        if chunk:
            yield address, chunk
            address += len(chunk)
        else:
            # Such as a page past the end of a mapped file.
            address += libc.PAGE_BYTES
