"""The budget of locked memory, and the slots that plaintexts lie in."""

import os
import resource
from collections.abc import Callable, Collection
from typing import Final

from kmsfs.errors import LockedMemoryExhausted
from kmsfs.memory.mapping import Held, LockedMapping, check_received, round_to_pages

# Linux stops at 65,530 mappings a process (vm.max_map_count); the interpreter and its threads
# need some, and half is left for them.
MAX_SLOTS: Final = 30_000

# Left of RLIMIT_MEMLOCK for the bounce buffer and what is in flight.
_RESERVED_BYTES: Final = 1 << 20


class Slot:
    """One whole plaintext in locked memory. Made by `Arena.adopt`."""

    __slots__ = ("_arena", "_mapping", "kind", "size_bytes")

    def __init__(self, arena: "Arena", mapping: LockedMapping | None, size_bytes: int, kind: Held):
        self._arena = arena
        self._mapping = mapping
        self.size_bytes: Final = size_bytes
        self.kind: Final = kind

    @property
    def mapped_bytes(self) -> int:
        """What the slot costs of the budget."""
        return 0 if self._mapping is None else self._mapping.mapped_bytes

    def copy_to(self, target: LockedMapping, offset: int, size_bytes: int) -> int:
        """Copy up to `size_bytes` from `offset` to the start of `target`.

        Returns: the bytes copied; 0 at or past the end.
        Plaintext: goes to `target`, which must be locked and is the caller's to wipe.
        """
        count = min(size_bytes, self.size_bytes - offset, target.mapped_bytes)
        if count <= 0 or self._mapping is None:
            return 0
        self._mapping.copy_to(target, offset, count)
        return count

    def write_to(self, fd: int, offset: int, size_bytes: int) -> int:
        """Write up to `size_bytes` from `offset` to the current position of a file.

        Returns: the bytes written; 0 at or past the end.
        Raises:
            OSError: the file takes none.
        Plaintext: goes to the file, straight from the slot.
        """
        count = min(size_bytes, self.size_bytes - offset)
        if count <= 0 or self._mapping is None:
            return 0
        return self._mapping.write_to(fd, offset, count)

    def wipe(self) -> None:
        """Overwrite the plaintext and give the memory back; again is harmless."""
        if self._mapping is not None:
            self._arena.give_back(self._mapping)
            self._mapping = None


class Arena:
    """Hands out slots within a budget, counted in whole pages.

    The budget is the smaller of `max_bytes` and RLIMIT_MEMLOCK less a reserve.

    Args:
        may_be_unlocked: take memory in all the same that cannot be locked; the budget is
            `max_bytes` then.
    """

    def __init__(self, max_bytes: int, *, may_be_unlocked: bool = False) -> None:
        self._may_be_unlocked = may_be_unlocked
        soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        unlimited = soft == resource.RLIM_INFINITY or may_be_unlocked
        limit = max_bytes if unlimited else max(0, soft - _RESERVED_BYTES)
        self.budget_bytes: Final = min(max_bytes, limit)
        self.used_bytes = 0
        self.slots = 0
        # Called with a size that does not fit; may wipe slots to make room for it, and should
        # leave them alone where that would not be enough.
        self.reclaim: Callable[[int], None] = lambda _size_bytes: None

    def has_room(self, size_bytes: int, *, without: Collection[Slot] = ()) -> bool:
        """Whether a plaintext of this size fits now, or would `without` some of the slots."""
        freed = [slot.mapped_bytes for slot in without if slot.mapped_bytes]
        used_bytes = self.used_bytes - sum(freed)
        return (
            used_bytes + round_to_pages(size_bytes) <= self.budget_bytes
            and self.slots - len(freed) < MAX_SLOTS
        )

    def fits_beside(self, size_bytes: int, slots: Collection[Slot]) -> bool:
        """Whether a plaintext of this size would fit if there were only these slots."""
        used = [slot.mapped_bytes for slot in slots if slot.mapped_bytes]
        needed_bytes = round_to_pages(size_bytes) if size_bytes else 0
        return sum(used) + needed_bytes <= self.budget_bytes and len(used) < MAX_SLOTS

    def adopt(self, fd: int | None, size_bytes: int) -> Slot:
        """Take over memory that a worker filled; closes `fd` in every case.

        Args:
            fd: from `create_secret_memory` in another process; None for an empty plaintext.

        Raises:
            LockedMemoryExhausted: over the budget or the process's limit.
            WorkerFailed: the memory is not what was announced.
        """
        if fd is None:
            return Slot(self, None, 0, "memfd_secret")
        try:
            kind = check_received(fd, size_bytes)
            if not self.has_room(size_bytes):
                self.reclaim(size_bytes)
            if not self.has_room(size_bytes):
                raise LockedMemoryExhausted(
                    f"{size_bytes} bytes do not fit: {self.used_bytes} of {self.budget_bytes} "
                    f"bytes in {self.slots} slots are in use"
                )
            mapping = LockedMapping.of(fd, kind, may_be_unlocked=self._may_be_unlocked)
        finally:
            os.close(fd)
        self.used_bytes += mapping.mapped_bytes
        self.slots += 1
        return Slot(self, mapping, size_bytes, kind if mapping.locked else "unlocked")

    def give_back(self, mapping: LockedMapping) -> None:
        """Wipe and unmap a slot's memory."""
        mapping.close()
        self.used_bytes -= mapping.mapped_bytes
        self.slots -= 1
