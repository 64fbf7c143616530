"""Locked mappings: wiped, locked, undumpable, not inherited, never resized under a reader."""

import faulthandler
import fcntl
import gc
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs import libc
from kmsfs.errors import LockedMemoryExhausted, WorkerFailed
from kmsfs.memory.mapping import (
    Kind,
    LockedMapping,
    check_received,
    create_secret_memory,
    round_to_pages,
)
from tests.support import forked
from tests.support.process_facts import locked_kib, mapping_flags, open_fds
from tests.support.secret_memory import filled_memory, second_look, without_memfd_secret

PAGE = libc.PAGE_BYTES
SECRET = b"what must not stay anywhere " * 200


@pytest.fixture
def fd_of_memfd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The fallback's memory with SECRET in it."""
    without_memfd_secret(monkeypatch)
    fd = filled_memory(SECRET)
    yield fd
    os.close(fd)


@pytest.fixture(params=["memfd_secret", "memfd"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Both kinds of memory; the first where this kernel has it."""
    if request.param == "memfd":
        without_memfd_secret(monkeypatch)
        return "memfd"
    try:
        os.close(libc.memfd_secret())
    except OSError:
        pytest.skip("this kernel has no memfd_secret")
    return "memfd_secret"


@pytest.mark.parametrize(
    ("size_bytes", "mapped_bytes"),
    [(0, PAGE), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (10 * PAGE - 1, 10 * PAGE)],
)
def test_sizes_are_rounded_to_whole_pages_and_never_none(
    size_bytes: int, mapped_bytes: int
) -> None:
    assert round_to_pages(size_bytes) == mapped_bytes


def test_created_memory_is_of_the_kind_it_says_and_has_whole_pages(kind: Kind) -> None:
    fd, created = create_secret_memory(PAGE + 1)
    try:
        assert created == kind
        assert os.fstat(fd).st_size == 2 * PAGE
        assert not os.get_inheritable(fd)
        assert check_received(fd, PAGE + 1) == kind
    finally:
        os.close(fd)


def test_created_memory_cannot_be_resized(kind: Kind) -> None:
    fd, _ = create_secret_memory(PAGE)
    try:
        for size_bytes in (0, 2 * PAGE):
            with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
                os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def test_close_zeroes_every_byte_before_unmapping(kind: Kind) -> None:
    fd = filled_memory(SECRET)
    with second_look(fd) as look:
        mapping = LockedMapping.of(fd, kind)
        os.close(fd)
        assert look[: len(SECRET)] == SECRET
        mapping.close()
        assert look[:] == bytes(len(look))


def test_wipe_zeroes_the_range_that_was_named_and_stays_mapped(fd_of_memfd: int) -> None:
    mapping = LockedMapping.of(fd_of_memfd, "memfd")
    with second_look(fd_of_memfd) as look:
        mapping.wipe(100)
        assert look[:100] == bytes(100)
        assert look[100 : len(SECRET)] == SECRET[100:]
        mapping.wipe()
        assert look[:] == bytes(len(look))
    mapping.close()


def test_release_leaves_the_content_to_whoever_took_the_memory_over(fd_of_memfd: int) -> None:
    mapping = LockedMapping.of(fd_of_memfd, "memfd")
    with second_look(fd_of_memfd) as look:
        mapping.release()
        assert look[: len(SECRET)] == SECRET


def test_a_borrowed_view_keeps_the_memory_mapped_but_not_its_content(fd_of_memfd: int) -> None:
    mapping = LockedMapping.of(fd_of_memfd, "memfd")
    view = mapping.borrow(len(SECRET))
    with pytest.raises(BufferError):
        mapping.close()
    assert bytes(view) == bytes(len(SECRET))
    mapping.take_back(view)
    mapping.close()


def test_closing_again_is_harmless_and_a_closed_mapping_refuses_every_use() -> None:
    mapping = LockedMapping.anonymous(PAGE)
    other = LockedMapping.anonymous(PAGE)
    mapping.close()
    mapping.close()
    for use in (
        lambda: mapping.borrow(1),
        mapping.wipe,
        mapping.release,
        lambda: mapping.copy_to(other, 0, 1),
        lambda: other.copy_to(mapping, 0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    other.close()


def test_no_call_reaches_beyond_its_mapping() -> None:
    one, two = LockedMapping.anonymous(PAGE), LockedMapping.anonymous(2 * PAGE)
    for use in (
        lambda: one.borrow(PAGE + 1),
        lambda: one.borrow(-1),
        lambda: one.wipe(PAGE + 1),
        lambda: one.wipe(-1),
        lambda: one.copy_to(two, 1, PAGE),
        lambda: one.copy_to(two, -1, 1),
        lambda: one.copy_to(two, 0, -1),
        lambda: two.copy_to(one, 0, PAGE + 1),
    ):
        with pytest.raises(ValueError, match=r"outside|too small"):
            use()
    one.close()
    two.close()


def test_mappings_are_locked_undumpable_and_not_inherited(kind: Kind) -> None:
    fd, _ = create_secret_memory(PAGE)
    mapping = LockedMapping.of(fd, kind)
    os.close(fd)
    flags = mapping_flags(mapping._address)
    assert {"lo", "dd", "dc"} <= flags
    mapping.close()


def test_anonymous_memory_is_locked_undumpable_and_not_inherited() -> None:
    mapping = LockedMapping.anonymous(PAGE)
    assert {"lo", "dd", "dc"} <= mapping_flags(mapping._address)
    mapping.close()


def test_a_forked_child_has_no_such_memory() -> None:
    mapping = LockedMapping.anonymous(PAGE)

    def touch() -> bool:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return mapping.borrow(1)[0] == 0

    status = forked.wait(forked.start(touch))
    mapping.close()
    assert status == -signal.SIGSEGV


def test_locked_memory_and_descriptors_return_to_where_they_began(kind: Kind) -> None:
    gc.collect()
    locked, fds = locked_kib(), open_fds()
    mappings = []
    for size_bytes in (1, PAGE, 300_000):
        fd, _ = create_secret_memory(size_bytes)
        mappings.append(LockedMapping.of(fd, kind))
        os.close(fd)
    assert locked_kib() == locked + sum(mapping.mapped_bytes for mapping in mappings) // 1024
    assert open_fds() == fds
    for mapping in mappings:
        mapping.close()
    assert locked_kib() == locked


def _sealed(seals: int, size_bytes: int = PAGE) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    "seals",
    [
        pytest.param(0, id="none"),
        pytest.param(fcntl.F_SEAL_SHRINK, id="can-grow"),
        pytest.param(fcntl.F_SEAL_GROW, id="can-shrink"),
        pytest.param(
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE, id="cannot-be-wiped"
        ),
        pytest.param(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10, id="future-write"),
    ],
)
def test_memory_with_other_seals_is_refused(seals: int) -> None:
    fd = _sealed(seals)
    try:
        with pytest.raises(WorkerFailed, match="seals"):
            check_received(fd, PAGE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("announced", [-1, PAGE + 1, 10 * PAGE, 2**62])
def test_memory_smaller_than_announced_is_refused(announced: int, kind: Kind) -> None:
    fd, _ = create_secret_memory(PAGE)
    try:
        with pytest.raises(WorkerFailed, match="announced"):
            check_received(fd, announced)
    finally:
        os.close(fd)


def test_memory_larger_than_announced_is_refused(kind: Kind) -> None:
    fd, _ = create_secret_memory(3 * PAGE)
    try:
        with pytest.raises(WorkerFailed, match="announced"):
            check_received(fd, PAGE)
    finally:
        os.close(fd)


def test_a_file_in_place_of_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(WorkerFailed, match=r"not memory|seals"):
            check_received(fd, PAGE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind_wanted", ["anonymous", "memfd", "memfd_secret"])
def test_over_the_process_limit_is_a_typed_error_that_leaves_nothing(
    kind_wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind_wanted == "memfd":
        without_memfd_secret(monkeypatch)

    def allocate() -> None:
        if kind_wanted == "anonymous":
            LockedMapping.anonymous(16 * PAGE)
        else:
            LockedMapping.of(*create_secret_memory(16 * PAGE))

    def check() -> bool:
        # Root's CAP_IPC_LOCK knows no limit.
        forked.limit_locked_memory(PAGE)
        with pytest.raises(LockedMemoryExhausted):
            allocate()
        return locked_kib() == 0

    assert forked.holds(check)
