"""Memory as a worker hands it over, for tests that play the worker."""

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from kmsfs import libc
from kmsfs.memory.arena import Arena, Slot
from kmsfs.memory.mapping import LockedMapping, create_secret_memory


def filled_memory(content: bytes) -> int:
    """A descriptor of secret memory that holds `content`, which is not empty."""
    fd, kind = create_secret_memory(len(content))
    mapping = LockedMapping.of(fd, kind)
    view = mapping.borrow(len(content))
    view[:] = content
    mapping.take_back(view)
    mapping.release()
    return fd


def adopt(arena: Arena, content: bytes) -> Slot:
    """A slot with this content."""
    return arena.adopt(filled_memory(content) if content else None, len(content))


def content_of(slot: Slot) -> bytes:
    """What a slot holds, read through a locked buffer as the views do."""
    target = LockedMapping.anonymous(max(1, slot.size_bytes))
    try:
        count = slot.copy_to(target, 0, slot.size_bytes)
        view = target.borrow(count)
        try:
            return bytes(view)
        finally:
            target.take_back(view)
    finally:
        target.close()


def content_of_memory(fd: int, size_bytes: int) -> bytes:
    """What a worker handed over; closes `fd`."""
    slot = Arena(64 << 20).adopt(fd, size_bytes)
    try:
        return content_of(slot)
    finally:
        slot.wipe()


def without_memfd_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a kernel that has no memfd_secret."""

    def refuse() -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(libc, "memfd_secret", refuse)


@contextlib.contextmanager
def second_look(fd: int) -> Iterator[mmap.mmap]:
    """Another mapping of a memfd, which outlives `fd` and sees what becomes of its memory."""
    with mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as look:
        yield look
