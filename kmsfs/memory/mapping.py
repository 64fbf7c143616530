"""One piece of memory that stays out of swap, core dumps and children, and can be wiped."""

import errno
import fcntl
import os
from typing import Final, Literal, NoReturn

from kmsfs import libc
from kmsfs.errors import LockedMemoryExhausted, WorkerFailed

# Against resizing, never against writing: what is sealed against writing cannot be wiped.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# fcntl.F_SEAL_FUTURE_WRITE has no name in Python before 3.13 (linux/fcntl.h).
_UNWIPEABLE: Final = fcntl.F_SEAL_WRITE | 0x0010
# MFD_NOEXEC_SEAL, Linux 6.3; an older kernel answers EINVAL.
_MFD_NOEXEC_SEAL: Final = 0x0008

# SECRETMEM_MAGIC of linux/magic.h.
_SECRETMEM_MAGIC: Final = 0x5345434D

# What mmap, mlock and ftruncate say when memory or the locked-memory limit is used up.
_EXHAUSTED: Final = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EPERM})

Kind = Literal["memfd_secret", "memfd"]
Held = Literal["memfd_secret", "memfd", "unlocked"]
"""How a plaintext lies in memory; `unlocked` is a memfd that could not be locked."""


def round_to_pages(size_bytes: int) -> int:
    """The bytes that `size_bytes` take when mapped; one page at least."""
    return max(1, -(-size_bytes // libc.PAGE_BYTES)) * libc.PAGE_BYTES


class LockedMapping:
    """A mapped range, locked, undumpable and not inherited by children.

    Views are borrowed; unmapping under one would crash whoever uses it, so `close` refuses while
    any is out.

    Attributes:
        locked: False only where the maker said that it need not be, and it could not be.
    """

    __slots__ = ("_address", "_borrowed", "locked", "mapped_bytes")

    def __init__(self, address: int, mapped_bytes: int, *, locked: bool) -> None:
        self._address = address
        self._borrowed = 0
        self.mapped_bytes: Final = mapped_bytes
        self.locked: Final = locked

    @classmethod
    def anonymous(cls, size_bytes: int, *, may_be_unlocked: bool = False) -> "LockedMapping":
        """Zeroed memory of this process alone.

        Raises:
            LockedMemoryExhausted: it cannot be had, or cannot be locked and must be.
        """
        mapped_bytes = round_to_pages(size_bytes)
        try:
            address = libc.map_anonymous(mapped_bytes)
        except OSError as error:
            _raise_exhausted(error, mapped_bytes)
        return cls._locked(address, mapped_bytes, may_be_unlocked=may_be_unlocked)

    @classmethod
    def of(cls, fd: int, kind: Kind, *, may_be_unlocked: bool = False) -> "LockedMapping":
        """Map the whole of a descriptor made by `create_secret_memory`; `fd` may then be closed.

        Raises:
            LockedMemoryExhausted: over the limit of locked memory. A memfd is mapped all the
                same if it `may_be_unlocked`.
        """
        mapped_bytes = os.fstat(fd).st_size
        try:
            address = libc.map_shared(fd, mapped_bytes)
        except OSError as error:
            _raise_exhausted(error, mapped_bytes)
        # The pages of memfd_secret are locked and undumpable by nature.
        return cls._locked(
            address,
            mapped_bytes,
            by_nature=kind == "memfd_secret",
            may_be_unlocked=may_be_unlocked,
        )

    @classmethod
    def _locked(
        cls,
        address: int,
        mapped_bytes: int,
        *,
        by_nature: bool = False,
        may_be_unlocked: bool = False,
    ) -> "LockedMapping":
        locked = True
        try:
            if not by_nature:
                locked = _lock(address, mapped_bytes, may_fail=may_be_unlocked)
                libc.madvise(address, mapped_bytes, libc.MADV_DONTDUMP)
            libc.madvise(address, mapped_bytes, libc.MADV_DONTFORK)
        except OSError as error:
            libc.munmap(address, mapped_bytes)
            _raise_exhausted(error, mapped_bytes)
        return cls(address, mapped_bytes, locked=locked)

    def borrow(self, size_bytes: int) -> memoryview:
        """A writable view of the first `size_bytes`; slices of it must not outlive it.

        To be given to `take_back`, or kept for as long as the process lives.
        """
        self._check_open()
        if not 0 <= size_bytes <= self.mapped_bytes:
            raise ValueError("range outside the mapping")
        self._borrowed += 1
        return libc.view(self._address, size_bytes)

    def take_back(self, borrowed: memoryview) -> None:
        """End a view that `borrow` gave."""
        borrowed.release()
        self._borrowed -= 1

    def copy_to(self, target: "LockedMapping", offset: int, size_bytes: int) -> None:
        """Copy a range that lies within both mappings to the start of `target`."""
        self._check_open()
        target._check_open()
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.mapped_bytes:
            raise ValueError("range outside the mapping")
        if size_bytes > target.mapped_bytes:
            raise ValueError("target too small")
        libc.copy(target._address, self._address + offset, size_bytes)

    def write_to(self, fd: int, offset: int, size_bytes: int) -> int:
        """Write a range to a file's current position, straight from this memory.

        Returns: the bytes written, which may be fewer.
        Raises:
            OSError: the file takes none.
        """
        self._check_open()
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.mapped_bytes:
            raise ValueError("range outside the mapping")
        whole = libc.view(self._address, self.mapped_bytes)
        with whole, whole[offset : offset + size_bytes] as part:
            return os.write(fd, part)

    def wipe(self, size_bytes: int | None = None) -> None:
        """Overwrite the first `size_bytes` (all by default) with zeros; stays mapped."""
        self._check_open()
        count = self.mapped_bytes if size_bytes is None else size_bytes
        if not 0 <= count <= self.mapped_bytes:
            raise ValueError("range outside the mapping")
        libc.fill_zero(self._address, count)

    def close(self) -> None:
        """Wipe and unmap; again is harmless.

        Raises:
            BufferError: a view is still out. The content is wiped all the same.
        """
        if self._address != 0:
            self.wipe()
            self.release()

    def release(self) -> None:
        """Unmap without wiping: another process has taken the memory over.

        Raises:
            BufferError: a view is still out.
        """
        self._check_open()
        if self._borrowed:
            raise BufferError("a view of this memory is still in use")
        libc.munmap(self._address, self.mapped_bytes)
        self._address = 0

    def _check_open(self) -> None:
        if self._address == 0:
            raise ValueError("the mapping is closed")


def create_secret_memory(size_bytes: int, *, may_be_unlocked: bool = False) -> tuple[int, Kind]:
    """Memory that can be passed to another process: its descriptor and its kind.

    memfd_secret where the kernel has it (root cannot read it through /proc, the kernel zeroes
    it when freed), else a memfd that can be neither shrunk nor grown. The size is that of whole
    pages.

    Args:
        may_be_unlocked: always a memfd: a process over its limit cannot map memfd_secret.

    Raises:
        LockedMemoryExhausted: no memory.
    """
    kind: Kind = "memfd_secret"
    try:
        fd = _create_memfd() if may_be_unlocked else libc.memfd_secret()
    except OSError:
        fd = _create_memfd()
    if libc.filesystem_magic(fd) != _SECRETMEM_MAGIC:
        kind = "memfd"
    try:
        os.ftruncate(fd, round_to_pages(size_bytes))
        if kind == "memfd":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        _raise_exhausted(error, size_bytes)
    return fd, kind


def check_received(fd: int, size_bytes: int) -> Kind:
    """Which kind of memory another process passed, and that it can hold `size_bytes` for good.

    Raises:
        WorkerFailed: of another size than claimed, memory that somebody could still resize under
            a reader or that cannot be wiped, or no memory at all.
    """
    held_bytes = os.fstat(fd).st_size
    if size_bytes < 0 or round_to_pages(size_bytes) != held_bytes:
        raise WorkerFailed(f"{size_bytes} bytes were announced, {held_bytes} handed over")
    if libc.filesystem_magic(fd) == _SECRETMEM_MAGIC:
        # It knows no seals, and lets its size be set once only.
        return "memfd_secret"
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise WorkerFailed("what was handed over is a file, not memory") from None
    if seals & _SEALS != _SEALS or seals & _UNWIPEABLE:
        raise WorkerFailed(f"the memory handed over has seals {seals:#x}")
    return "memfd"


def _lock(address: int, size_bytes: int, *, may_fail: bool) -> bool:
    try:
        libc.mlock(address, size_bytes)
    except OSError as error:
        if may_fail and error.errno in _EXHAUSTED:
            return False
        raise
    return True


def _create_memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("kmsfs", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create("kmsfs", flags)


def _raise_exhausted(error: OSError, size_bytes: int) -> NoReturn:
    if error.errno in _EXHAUSTED:
        raise LockedMemoryExhausted(
            f"{size_bytes} bytes of locked memory refused: {error.strerror}"
        ) from error
    raise error
