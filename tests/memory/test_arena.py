"""The budget of slots: pages are counted, nothing leaks, what does not fit disturbs nobody."""

import resource

import pytest

from kmsfs import libc
from kmsfs.errors import LockedMemoryExhausted, WorkerFailed
from kmsfs.memory import arena as arena_module
from kmsfs.memory.arena import Arena, Slot
from kmsfs.memory.mapping import LockedMapping
from tests.support import forked
from tests.support.process_facts import locked_kib, open_fds
from tests.support.secret_memory import (
    adopt,
    content_of,
    filled_memory,
    second_look,
    without_memfd_secret,
)

PAGE = libc.PAGE_BYTES


def test_a_slot_costs_whole_pages_and_gives_them_back_once() -> None:
    arena = Arena(10 * PAGE)
    slot = adopt(arena, b"x" * (PAGE + 1))
    assert (arena.used_bytes, arena.slots, slot.mapped_bytes) == (2 * PAGE, 1, 2 * PAGE)
    slot.wipe()
    slot.wipe()
    assert (arena.used_bytes, arena.slots, slot.mapped_bytes) == (0, 0, 0)


def test_locked_memory_and_descriptors_return_to_where_they_began() -> None:
    locked, fds = locked_kib(), open_fds()
    arena = Arena(1 << 20)
    slots = [adopt(arena, bytes([n]) * n * 1000) for n in range(1, 20)]
    assert locked_kib() > locked
    assert open_fds() == fds
    for n, slot in enumerate(slots, start=1):
        assert content_of(slot) == bytes([n]) * n * 1000
        slot.wipe()
    assert (locked_kib(), open_fds()) == (locked, fds)


def test_wiping_zeroes_the_memory_before_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    without_memfd_secret(monkeypatch)
    fd = filled_memory(b"to be gone" * 100)
    with second_look(fd) as look:
        slot = Arena(1 << 20).adopt(fd, 1000)
        assert slot.kind == "memfd"
        assert look[:1000] == b"to be gone" * 100
        slot.wipe()
        assert look[:] == bytes(len(look))


def test_an_empty_plaintext_costs_nothing() -> None:
    arena = Arena(0)
    slot = arena.adopt(None, 0)
    assert (slot.size_bytes, slot.mapped_bytes, arena.slots) == (0, 0, 0)
    assert content_of(slot) == b""
    slot.wipe()
    assert arena.slots == 0


@pytest.mark.parametrize(
    ("offset", "size_bytes", "wanted"),
    [
        (0, 10, b"0123456789"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, 5, b""),
        (99, 5, b""),
        (0, 0, b""),
    ],
)
def test_copying_ends_where_the_plaintext_ends(offset: int, size_bytes: int, wanted: bytes) -> None:
    slot, target = adopt(Arena(PAGE), b"0123456789"), LockedMapping.anonymous(PAGE)
    count = slot.copy_to(target, offset, size_bytes)
    view = target.borrow(PAGE)
    assert bytes(view[:count]) == wanted
    assert bytes(view[count:]) == bytes(PAGE - count)
    target.take_back(view)
    target.close()
    slot.wipe()


def test_over_budget_is_refused_without_a_trace_and_without_closing_others() -> None:
    arena = Arena(2 * PAGE)
    slot, fds = adopt(arena, b"a" * PAGE), open_fds()
    with pytest.raises(LockedMemoryExhausted, match=f"{PAGE} of {2 * PAGE} bytes in 1 slots"):
        adopt(arena, b"b" * (PAGE + 1))
    assert (open_fds(), arena.used_bytes, arena.slots) == (fds, PAGE, 1)
    assert content_of(slot) == b"a" * PAGE
    slot.wipe()


def test_reclaiming_makes_room() -> None:
    arena = Arena(2 * PAGE)
    slots: list[Slot] = [adopt(arena, b"a" * PAGE), adopt(arena, b"b" * PAGE)]
    asked: list[int] = []

    def reclaim(size_bytes: int) -> None:
        asked.append(size_bytes)
        slots.pop(0).wipe()

    arena.reclaim = reclaim
    slots.append(adopt(arena, b"c"))
    assert asked == [1]
    assert arena.used_bytes == 2 * PAGE
    for slot in slots:
        slot.wipe()


def test_what_would_fit_is_told_beside_some_of_the_slots() -> None:
    arena = Arena(3 * PAGE)
    slots = [adopt(arena, b"x"), adopt(arena, b"y" * 2 * PAGE)]
    assert arena.fits_beside(2 * PAGE, slots[:1])
    assert not arena.fits_beside(2 * PAGE + 1, slots[:1])
    assert arena.fits_beside(0, slots)
    assert not arena.fits_beside(1, slots)
    for slot in slots:
        slot.wipe()


def test_the_number_of_slots_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "MAX_SLOTS", 3)
    arena = Arena(1 << 20)
    slots = [adopt(arena, b"x") for _ in range(3)]
    with pytest.raises(LockedMemoryExhausted):
        adopt(arena, b"x")
    assert arena.has_room(1, without=slots[:1])
    assert arena.fits_beside(1, slots[:2])
    assert not arena.fits_beside(1, slots)
    assert not arena.has_room(1, without=[arena.adopt(None, 0)])
    for slot in slots:
        slot.wipe()
    adopt(arena, b"x").wipe()


@pytest.mark.parametrize("announced", [0, 1, PAGE + 1])
def test_memory_of_another_size_is_refused_and_closed(announced: int) -> None:
    arena, fds = Arena(1 << 20), open_fds()
    with pytest.raises(WorkerFailed):
        arena.adopt(filled_memory(b"x" * 2 * PAGE), announced + 4 * PAGE)
    assert (open_fds(), arena.used_bytes) == (fds, 0)


def test_the_budget_is_the_smaller_of_configuration_and_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for soft, max_bytes, wanted in (
        (8 << 20, 64 << 20, 7 << 20),
        (8 << 20, 1 << 20, 1 << 20),
        (1 << 19, 1 << 20, 0),
        (resource.RLIM_INFINITY, 5 << 30, 5 << 30),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert Arena(max_bytes).budget_bytes == wanted


def test_the_real_limit_of_this_process_is_honoured() -> None:
    def check() -> bool:
        forked.limit_locked_memory((1 << 20) + 4 * PAGE)
        arena = Arena(64 << 20)
        slots = [adopt(arena, b"x") for _ in range(4)]
        with pytest.raises(LockedMemoryExhausted):
            adopt(arena, b"x")
        return len(slots) == 4

    assert forked.holds(check)
