"""How long a plaintext is held, and for whom, on a clock of the test's own."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import (
    CiphertextInvalid,
    CredentialsUnavailable,
    DeadlineExceeded,
    GuaranteeNotMet,
    KeyAccessDenied,
    KmsAnswerInvalid,
    KmsfsError,
    KmsUnreachable,
    LockedMemoryExhausted,
    TooManyWaiting,
    VolumeLocked,
    WorkerBug,
    WorkerFailed,
)
from kmsfs.events import Decrypted, DecryptFailed, Wiped
from kmsfs.formats.detect import Format
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.arena import Arena
from kmsfs.memory.mapping import LockedMapping
from kmsfs.settings import CacheSettings
from kmsfs.store import cache as cache_module
from kmsfs.store.cache import PlaintextCache
from kmsfs.store.lease import Lease
from kmsfs.store.source import SourceFile
from tests.support.events import Recorder
from tests.support.secret_memory import adopt

OPEN_S = 8.0


def file(path: str = "a", version: int = 1, problem: str = "") -> SourceFile:
    """A file of some version."""
    return SourceFile(
        path=path,
        source_path=path + ".encrypted",
        version=(1, 1, 1, version, version),
        format=Format.ESDK,
        size_bytes=0,
        size_exact=False,
        key="key",
        bound=True,
        suffix_taken=True,
        problem=problem,
    )


class Site:
    """A cache whose decryptor does as told: `error` is raised, `gate` waited for."""

    def __init__(self, clock: trio.testing.MockClock, limits: CacheSettings, pages: int) -> None:
        self.clock = clock
        self.arena = Arena(pages * PAGE_BYTES)
        self.events = Recorder()
        self.cache = PlaintextCache(self.arena, limits, self.events, self._decrypt)
        self.error: Exception | None = None
        self.gate: trio.Event | None = None
        self.calls: list[SourceFile] = []
        self.size_bytes = 10

    async def _decrypt(self, file: SourceFile, _deadline: float) -> Plaintext:
        self.calls.append(file)
        error, gate = self.error, self.gate
        if gate is not None:
            await gate.wait()
        if error is not None:
            raise error
        content = f"{file.path}{file.version[3]}".encode().ljust(self.size_bytes, b".")
        return Plaintext(adopt(self.arena, content), "arn:key", "test")

    async def open(self, wanted: SourceFile | None = None) -> tuple[Lease, bool]:
        """One open with the usual deadline."""
        return await self.cache.acquire(wanted or file(), trio.current_time() + OPEN_S)

    async def open_and_close(self, wanted: SourceFile | None = None) -> bool:
        """Whether it was there already."""
        lease, from_cache = await self.open(wanted)
        lease.close()
        return from_cache

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, and happen what is due."""
        self.clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()

    def wipes(self) -> list[str]:
        """Why plaintexts were wiped so far."""
        return [event.reason for event in self.events.events if isinstance(event, Wiped)]


Clock = trio.testing.MockClock
Open = Callable[..., contextlib.AbstractAsyncContextManager[Site]]


@pytest.fixture
def site(mock_clock: Clock) -> Open:
    """Opens a `Site`; at its end every slot must be gone.

    Every test takes `mock_clock` itself as well: pytest-trio looks no further for its clock.
    """

    @contextlib.asynccontextmanager
    async def open_site(pages: int = 4, **limits: float) -> AsyncIterator[Site]:
        chosen = CacheSettings(**{"ttl_s": 100.0, "idle_s": 30.0, "stale_s": 0.0, **limits})  # type: ignore[arg-type] # floats
        found = Site(mock_clock, chosen, pages)
        async with trio.open_nursery() as nursery:
            await nursery.start(found.cache.run)
            yield found
            nursery.cancel_scope.cancel()
        assert (found.arena.used_bytes, found.arena.slots) == (0, 0)

    return open_site


def read(lease: Lease) -> bytes:
    """The start of what a lease gives."""
    target = LockedMapping.anonymous(1)
    try:
        count = lease.copy_to(target, 0, 100)
        view = target.borrow(count)
        try:
            return bytes(view)
        finally:
            target.take_back(view)
    finally:
        target.close()


@pytest.mark.trio
async def test_a_plaintext_serves_until_its_time_is_over_and_not_longer(
    site: Open, mock_clock: Clock
) -> None:
    async with site(idle_s=1000) as s:
        assert not await s.open_and_close()
        await s.pass_time(99.9)
        assert await s.open_and_close()
        await s.pass_time(0.2)
        assert s.wipes() == ["expired"]
        assert not await s.open_and_close()
        assert len(s.calls) == 2


@pytest.mark.trio
async def test_a_plaintext_nobody_uses_goes_earlier(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        await s.open_and_close()
        await s.pass_time(29)
        assert await s.open_and_close()
        await s.pass_time(29)
        assert s.arena.slots == 1
        await s.pass_time(1.1)
        assert (s.arena.slots, s.wipes()) == (0, ["expired"])


@pytest.mark.trio
async def test_an_open_file_keeps_its_plaintext_until_its_last_close(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        lease, _ = await s.open()
        other, from_cache = await s.open()
        assert from_cache
        await s.pass_time(1000)
        assert read(lease) == b"a1........"
        other.close()
        assert s.arena.slots == 1
        lease.close()
        await trio.testing.wait_all_tasks_blocked()
        assert s.arena.slots == 0


@pytest.mark.trio
async def test_a_newer_version_is_decrypted_beside_the_one_that_is_open(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        older, _ = await s.open(file(version=1))
        newer, from_cache = await s.open(file(version=2))
        assert not from_cache
        assert (read(older), read(newer)) == (b"a1........", b"a2........")
        older.close()
        assert s.wipes() == ["last close"]
        assert read(newer) == b"a2........"
        newer.close()


@pytest.mark.trio
async def test_a_ttl_of_zero_never_ends(site: Open, mock_clock: Clock) -> None:
    async with site(ttl_s=0, idle_s=1e9) as s:
        assert not await s.open_and_close()
        mock_clock.jump(1e8)
        assert await s.open_and_close()
        assert len(s.calls) == 1


@pytest.mark.trio
async def test_everybody_shares_one_decryption_and_its_error(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        for error in (None, KeyAccessDenied("no")):
            s.calls.clear()
            s.error, s.gate = error, trio.Event()
            ends: list[object] = []

            async def open_one(ends: list[object] = ends) -> None:
                try:
                    ends.append(await s.open_and_close(file(version=id(ends))))
                except KmsfsError as caught:
                    ends.append(caught)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(open_one)
                await trio.testing.wait_all_tasks_blocked()
                s.gate.set()
            assert ends == [error or False] * 20
            assert len(s.calls) == 1


@pytest.mark.trio
async def test_a_refusal_ends_what_was_decrypted_before(site: Open, mock_clock: Clock) -> None:
    for error in (KeyAccessDenied("no"), CiphertextInvalid("bad")):
        async with site(ttl_s=10, idle_s=1000, stale_s=50) as s:
            lease, _ = await s.open()
            await s.pass_time(11)
            s.error = error
            with pytest.raises(type(error)):
                await s.open()
            s.error = KmsUnreachable("away")
            with pytest.raises(KmsUnreachable):
                await s.open()
            assert read(lease) == b"a1........"
            lease.close()
            assert s.arena.slots == 0


@pytest.mark.parametrize(
    "error",
    [
        KmsUnreachable("away"),
        CredentialsUnavailable("none"),
        KmsAnswerInvalid("a captive portal"),
        WorkerFailed("lost"),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.trio
async def test_without_a_verdict_of_kms_a_stale_plaintext_serves_for_as_long_as_allowed(
    site: Open, mock_clock: Clock, error: KmsfsError
) -> None:
    async with site(ttl_s=10, idle_s=1000, stale_s=5) as s:
        lease, _ = await s.open()
        await s.pass_time(11)
        s.error = error
        assert await s.open_and_close()
        assert len(s.calls) == 2
        await s.pass_time(5)
        with pytest.raises(type(error)):
            await s.open()
        lease.close()


@pytest.mark.trio
async def test_a_stale_plaintext_ends_while_somebody_waits(site: Open, mock_clock: Clock) -> None:
    async with site(ttl_s=10, idle_s=1000, stale_s=5) as s:
        await s.open_and_close()
        await s.pass_time(14)
        s.gate = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(DeadlineExceeded):
                    await s.open()

            await trio.testing.wait_all_tasks_blocked()
            await s.pass_time(OPEN_S)
        s.gate.set()


@pytest.mark.trio
async def test_errors_that_say_nothing_of_kms_make_nothing_stale(
    site: Open, mock_clock: Clock
) -> None:
    async with site(ttl_s=10, idle_s=1000, stale_s=5) as s:
        await s.open_and_close()
        await s.pass_time(11)
        s.error = LockedMemoryExhausted("no room")
        with pytest.raises(LockedMemoryExhausted):
            await s.open()


@pytest.mark.trio
async def test_an_unforeseen_error_costs_its_own_file_only_and_tells_its_class(
    site: Open,
    mock_clock: Clock,
) -> None:
    async with site() as s:
        s.error = ValueError("perhaps content")
        with pytest.raises(WorkerBug, match=r"^ValueError while decrypting$"):
            await s.open()
        s.error = None
        assert not await s.open_and_close()


@pytest.mark.trio
async def test_every_open_ends_with_its_deadline(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        s.gate = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(DeadlineExceeded):
                    await s.open()

            await trio.testing.wait_all_tasks_blocked()
            await s.pass_time(OPEN_S)
        s.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await s.open_and_close(), "what came late serves the next open"


@pytest.mark.trio
async def test_a_cancelled_open_leaves_the_decryption_to_the_next(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        s.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.open)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        s.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await s.open_and_close()
        assert len(s.calls) == 1


@pytest.mark.trio
async def test_only_so_many_may_wait(
    site: Open, mock_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MAX_WAITING", 2)
    async with site() as s, trio.open_nursery() as nursery:
        s.gate = trio.Event()
        nursery.start_soon(s.open_and_close, file("a"))
        nursery.start_soon(s.open_and_close, file("b"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TooManyWaiting):
            await s.open(file("a"))
        s.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await s.open_and_close(file("a"))


@pytest.mark.trio
async def test_only_as_many_are_decrypted_at_once_as_there_are_descriptors_for(
    site: Open, mock_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site() as s, trio.open_nursery() as nursery:
        monkeypatch.setattr(s.cache, "max_decryptions", 2)
        s.gate = trio.Event()
        nursery.start_soon(s.open_and_close, file("a"))
        nursery.start_soon(s.open_and_close, file("b"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TooManyWaiting, match="descriptors"):
            await s.open(file("c"))
        # It needs none of its own.
        nursery.start_soon(s.open_and_close, file("b"))
        await trio.testing.wait_all_tasks_blocked()
        s.cache.retire("")
        with pytest.raises(TooManyWaiting):
            await s.open(file("a"))
        s.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not await s.open_and_close(file("c"))


@pytest.mark.trio
async def test_a_known_problem_is_told_without_decrypting(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        with pytest.raises(CiphertextInvalid, match="truncated"):
            await s.open(file(problem="truncated"))
        assert s.calls == []
        assert s.cache.history.failures["a"].error == "CiphertextInvalid"


@pytest.mark.trio
async def test_failures_are_remembered_until_the_file_is_decrypted(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        s.error = KeyAccessDenied("no permission")
        with pytest.raises(KeyAccessDenied):
            await s.open()
        failure = s.cache.history.failures["a"]
        assert (failure.error, failure.detail, failure.hint) == (
            "KeyAccessDenied",
            "no permission",
            KeyAccessDenied.hint,
        )
        s.error = None
        await s.open_and_close()
        assert s.cache.history.failures == {}
        assert [type(e) for e in s.events.events] == [DecryptFailed, Decrypted]


# --- room -----------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_least_recently_used_goes_first_and_nothing_that_is_open(
    site: Open, mock_clock: Clock
) -> None:
    async with site(pages=3) as s:
        opened, _ = await s.open(file("open"))
        for path in ("older", "newer"):
            await s.pass_time(1)
            await s.open_and_close(file(path))
        await s.pass_time(1)
        await s.open_and_close(file("older"))
        await s.open_and_close(file("fourth"))
        assert {entry.path for entry in s.cache.held()} == {"open", "older", "fourth"}
        assert s.wipes() == ["evicted"]
        opened.close()


@pytest.mark.trio
async def test_what_cannot_fit_pushes_nothing_out(site: Open, mock_clock: Clock) -> None:
    async with site(pages=3) as s:
        opened, _ = await s.open(file("open"))
        await s.open_and_close(file("kept"))
        for pages in (4, 3):
            s.size_bytes = pages * PAGE_BYTES
            with pytest.raises(LockedMemoryExhausted):
                await s.open(file("large"))
        assert {entry.path for entry in s.cache.held()} == {"open", "kept"}
        opened.close()


# --- lock -----------------------------------------------------------------------------------------


async def _no_workers() -> None:
    pass


@pytest.mark.trio
async def test_lock_wipes_what_is_open_and_leases_stay_dead(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        lease, _ = await s.open()
        await s.cache.lock(_no_workers)
        assert s.arena.slots == 0
        with pytest.raises(VolumeLocked):
            await s.open()
        s.cache.unlock()
        with pytest.raises(VolumeLocked):
            read(lease)
        assert not await s.open_and_close()
        with pytest.raises(VolumeLocked):
            read(lease)
        lease.close()


@pytest.mark.trio
async def test_lock_wipes_only_after_workers_have_ended(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        await s.open_and_close()
        seen = []

        async def end_workers() -> None:
            seen.append((s.cache.locked, s.arena.slots))

        await s.cache.lock(end_workers)
        assert seen == [(True, 1)]
        assert s.arena.slots == 0


@pytest.mark.trio
async def test_lock_wipes_even_if_a_worker_cannot_be_ended(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        await s.open_and_close()

        async def end_workers() -> None:
            raise GuaranteeNotMet("stuck")

        with pytest.raises(GuaranteeNotMet):
            await s.cache.lock(end_workers)
        assert (s.arena.slots, s.cache.locked) == (0, True)


@pytest.mark.trio
async def test_opens_that_wait_are_told_of_the_lock(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        s.gate = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(VolumeLocked):
                    await s.open()

            await trio.testing.wait_all_tasks_blocked()
            await s.cache.lock(_no_workers)


@pytest.mark.trio
async def test_after_detaching_only_what_is_open_is_held(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        lease, _ = await s.open(file("open"))
        await s.open_and_close(file("idle"))
        s.cache.detach()
        assert {entry.path for entry in s.cache.held()} == {"open"}
        late, from_cache = await s.open(file("open"))
        assert not from_cache
        late.close()
        assert s.arena.slots == 1
        lease.close()
        assert s.arena.slots == 0


@pytest.mark.trio
async def test_ending_wipes_everything(site: Open, mock_clock: Clock) -> None:
    async with site() as s:
        await s.open(file("a"))
        await s.open_and_close(file("b"))
    assert s.wipes() == ["end", "end"]


@pytest.mark.trio
async def test_retired_plaintexts_are_wiped_and_the_next_open_asks_anew(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        for path in ("a", "sub/b", "sub/c", "subway"):
            await s.open_and_close(file(path))
        s.cache.retire("sub")
        assert s.wipes() == ["refreshed", "refreshed"]
        assert [entry.path for entry in s.cache.held()] == ["a", "subway"]
        assert not await s.open_and_close(file("sub/b"))
        assert await s.open_and_close(file("a"))
        s.cache.retire("")
        assert [entry.path for entry in s.cache.held()] == []


@pytest.mark.trio
async def test_a_retired_plaintext_that_is_open_is_wiped_at_its_last_close(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s:
        lease, _ = await s.open()
        s.cache.retire("a")
        assert s.wipes() == []
        assert read(lease) == b"a1........"
        assert not await s.open_and_close()
        lease.close()
        assert s.wipes() == ["last close"]


@pytest.mark.trio
async def test_a_decryption_begun_before_is_for_those_alone_who_wait_for_it(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s, trio.open_nursery() as nursery:
        s.gate = first_gate = trio.Event()
        results: list[bool] = []

        async def open_once() -> None:
            results.append(await s.open_and_close())

        nursery.start_soon(open_once)
        await trio.testing.wait_all_tasks_blocked()
        s.cache.retire("a")
        s.gate = None
        assert not await s.open_and_close()
        assert len(s.calls) == 2
        first_gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert results == [False]
        # The newer one stays, and the older one is gone with those who waited.
        assert s.wipes() == ["last close"]
        assert await s.open_and_close()


@pytest.mark.trio
async def test_lock_ends_decryptions_that_were_retired_as_well(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s, trio.open_nursery() as nursery:
        s.gate = trio.Event()

        async def open_refused() -> None:
            with pytest.raises(VolumeLocked):
                await s.open()

        async def end_workers() -> None:
            await trio.lowlevel.checkpoint()

        nursery.start_soon(open_refused)
        await trio.testing.wait_all_tasks_blocked()
        s.cache.retire("")
        with trio.fail_after(1):
            await s.cache.lock(end_workers)


@pytest.mark.trio
async def test_a_plaintext_past_its_time_is_stale_until_it_is_decrypted_anew(
    site: Open, mock_clock: Clock
) -> None:
    async with site(idle_s=1000, stale_s=50) as s:
        await s.open_and_close()
        await s.pass_time(99)
        assert not s.cache.is_stale("a")
        await s.pass_time(2)
        assert s.cache.is_stale("a")
        await s.open_and_close()
        assert not s.cache.is_stale("a")
        assert not s.cache.is_stale("never opened")


@pytest.mark.trio
async def test_bad_ciphertext_that_was_replaced_meanwhile_takes_nothing_from_the_new_one(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s, trio.open_nursery() as nursery:
        s.gate, s.error = trio.Event(), CiphertextInvalid("cut")

        async def open_the_old_one() -> None:
            with pytest.raises(CiphertextInvalid):
                await s.open(file(version=1))

        nursery.start_soon(open_the_old_one)
        await trio.testing.wait_all_tasks_blocked()
        gate, s.gate, s.error = s.gate, None, None
        assert not await s.open_and_close(file(version=2))
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert s.cache.history.failures == {}
        assert await s.open_and_close(file(version=2))


@pytest.mark.trio
async def test_a_failure_of_a_retired_decryption_is_not_that_of_the_newer_one(
    site: Open, mock_clock: Clock
) -> None:
    async with site() as s, trio.open_nursery() as nursery:
        s.gate, s.error = trio.Event(), KmsUnreachable("no answer")

        async def open_before() -> None:
            with pytest.raises(KmsUnreachable):
                await s.open()

        nursery.start_soon(open_before)
        await trio.testing.wait_all_tasks_blocked()
        s.cache.retire("")
        gate, s.gate, s.error = s.gate, None, None
        await s.open_and_close()
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert s.cache.history.failures == {}
        assert await s.open_and_close()


@pytest.mark.trio
async def test_what_cannot_have_room_is_refused_without_asking_kms(
    site: Open, mock_clock: Clock
) -> None:
    def sized(path: str, pages: int) -> SourceFile:
        return dataclasses.replace(file(path), size_bytes=pages * PAGE_BYTES, size_exact=True)

    async with site(pages=2) as s:
        s.size_bytes = PAGE_BYTES
        await s.open_and_close(sized("closed", 1))
        lease, _ = await s.open(sized("open", 1))
        with pytest.raises(LockedMemoryExhausted):
            await s.open(sized("two pages", 2))
        assert [call.path for call in s.calls] == ["closed", "open"]
        assert "two pages" in s.cache.history.failures
        # What is closed makes room, and who waits already is waited with.
        s.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.open_and_close, sized("one page", 1))
            await trio.testing.wait_all_tasks_blocked()
            second, _ = await s.open(sized("closed", 1))
            nursery.start_soon(s.open_and_close, sized("one page", 1))
            await trio.testing.wait_all_tasks_blocked()
            second.close()
            s.gate.set()
        lease.close()
        assert [call.path for call in s.calls] == ["closed", "open", "one page"]
