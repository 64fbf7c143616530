"""The cache in every order of events, with real locked memory and a clock of the test's own."""

from dataclasses import dataclass, field

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import (
    CiphertextInvalid,
    DeadlineExceeded,
    KeyAccessDenied,
    KmsfsError,
    KmsUnreachable,
    LockedMemoryExhausted,
    VolumeLocked,
    WorkerFailed,
)
from kmsfs.formats.detect import Format
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.arena import Arena, Slot
from kmsfs.memory.mapping import LockedMapping, round_to_pages
from kmsfs.settings import CacheSettings
from kmsfs.store.cache import CachedFile, PlaintextCache
from kmsfs.store.lease import Lease
from kmsfs.store.source import SourceFile
from tests.support.events import Recorder
from tests.support.guest_trio import GuestTrio
from tests.support.process_facts import locked_kib, open_fds
from tests.support.secret_memory import adopt

TTL_S, IDLE_S = 10.0, 4.0
OPEN_DEADLINE_S = 8.0
BUDGET_PAGES = 6
PATHS = ("a", "b", "c")

ERRORS: dict[str, type[KmsfsError]] = {
    "refused": KeyAccessDenied,
    "unreachable": KmsUnreachable,
    "worker death": WorkerFailed,
    "corrupt": CiphertextInvalid,
}


def content_of_version(path: str, version: int) -> bytes:
    """What a version decrypts to: sizes from none to three pages, and no two alike."""
    size_bytes = (version * 1777 + ord(path) * 911) % (3 * PAGE_BYTES)
    return (f"{path}{version}|".encode() * size_bytes)[:size_bytes]


def source_file(path: str, version: int) -> SourceFile:
    """A file as the source shows it."""
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
    )


@dataclass(eq=False)
class Opening:
    """One open: under way, or with its lease or error."""

    path: str
    version: int
    deadline: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    lease: Lease | None = None
    error: KmsfsError | None = None
    ended: bool = False
    dead: bool = False
    closed: bool = False


@dataclass(eq=False)
class Decryption:
    """One call of the decryptor, waiting for the test's word."""

    file: SourceFile
    answered: trio.Event = field(default_factory=trio.Event)
    outcome: str = ""
    slot: Slot | None = None


class CacheMachine(RuleBasedStateMachine):
    """Opens, answers, time, locks in any order; `reachable` is what may be served at all."""

    openings = Bundle("openings")

    @initialize(stale_s=st.sampled_from([0.0, 5.0]))
    def begin(self, stale_s: float) -> None:
        self.fds, self.locked_kib = open_fds(), locked_kib()
        self.trio = GuestTrio()
        self.stale_s = stale_s
        self.arena = Arena(BUDGET_PAGES * PAGE_BYTES)
        self.buffer = LockedMapping.anonymous(3 * PAGE_BYTES)
        self.events = Recorder()
        limits = CacheSettings(ttl_s=TTL_S, idle_s=IDLE_S, stale_s=stale_s)
        self.cache = PlaintextCache(self.arena, limits, self.events, self.decrypt)
        self.versions = dict.fromkeys(PATHS, 1)
        self.under_way: list[Decryption] = []
        self.all_openings: list[Opening] = []
        # By path: version and time of the last decryption that may still be served.
        self.served: dict[str, tuple[int, float]] = {}
        self.detached = False
        self.trio.do(self._start)

    async def _start(self) -> None:
        await self.trio.nursery.start(self.cache.run)

    @property
    def now(self) -> float:
        """The clock."""
        return self.trio.clock.current_time()

    def held(self) -> list[CachedFile]:
        """What the cache says it holds."""

        async def ask() -> list[CachedFile]:
            return self.cache.held()

        held: list[CachedFile] = self.trio.do(ask)
        return held

    # --- the part of the decryptor ---------------------------------------------------------------

    async def decrypt(self, file: SourceFile, deadline: float) -> Plaintext:
        """`DecryptFile`: waits for `answer`."""
        same = [
            d for d in self.under_way if (d.file.path, d.file.version) == (file.path, file.version)
        ]
        assert not same, "two decryptions of one version at once"
        call = Decryption(file)
        self.under_way.append(call)
        try:
            with trio.move_on_at(deadline):
                await call.answered.wait()
                plaintext = self._result(call)
                # As when the worker has been thanked: cancelling comes too late.
                await trio.lowlevel.cancel_shielded_checkpoint()
                return plaintext
            raise DeadlineExceeded("late")
        finally:
            self.under_way.remove(call)

    def _result(self, call: Decryption) -> Plaintext:
        path, version = call.file.path, call.file.version[3]
        if call.outcome != "decrypted":
            served_version, _ = self.served.get(path, (version, 0.0))
            # Bad ciphertext says nothing of another version.
            if call.outcome == "refused" or (
                call.outcome == "corrupt" and served_version == version
            ):
                self.served.pop(path, None)
            raise ERRORS[call.outcome]("as the test wants it")
        content = content_of_version(path, version)
        try:
            slot = call.slot = adopt(self.arena, content)
        except LockedMemoryExhausted:
            held = sum(
                round_to_pages(entry.size_bytes)
                for entry in self.cache.held()
                if entry.leases and entry.size_bytes
            )
            # Others may have their memory already, and be on the way into the cache.
            held += sum(other.slot.mapped_bytes for other in self.under_way if other.slot)
            assert held + round_to_pages(len(content)) > self.arena.budget_bytes
            raise
        if not self.detached:
            self.served[path] = (version, self.now)
        return Plaintext(slot, "arn:key", "test")

    # --- what happens ----------------------------------------------------------------------------

    @rule(
        target=openings,
        path=st.sampled_from(PATHS),
        count=st.integers(1, 3),
        outcome=st.sampled_from(["", "decrypted", "decrypted"]),
        change=st.sampled_from([0, 0, 1, -1]),
    )
    def open(self, path: str, count: int, outcome: str, change: int) -> object:
        """One or several programs open a file; its decryption, if any, may end at once.

        Args:
            change: before that the ciphertext was replaced, or an older one came back.
        """
        self.versions[path] = max(1, self.versions[path] + change)
        new = []
        for _ in range(count):
            opening = Opening(path, self.versions[path], self.now + OPEN_DEADLINE_S)
            self.all_openings.append(opening)
            new.append(opening)
            self.trio.do(self._start_open, opening)
        wanted = (path, source_file(path, self.versions[path]).version)
        for call in list(self.under_way):
            if outcome and (call.file.path, call.file.version) == wanted:
                self._end(call, outcome)
        return multiple(*new)

    async def _start_open(self, opening: Opening) -> None:
        self.trio.nursery.start_soon(self._open, opening)

    async def _open(self, opening: Opening) -> None:
        file = source_file(opening.path, opening.version)
        try:
            with opening.scope:
                opening.lease, from_cache = await self.cache.acquire(file, opening.deadline)
                self._check_given(opening, from_cache=from_cache)
        except KmsfsError as error:
            opening.error = error
        finally:
            opening.ended = True

    def _check_given(self, opening: Opening, *, from_cache: bool) -> None:
        assert not self.cache.locked
        if from_cache:
            assert opening.path in self.served, "served after it was refused, locked or detached"
            version, ready_at = self.served[opening.path]
            assert version == opening.version
            assert self.now < ready_at + TTL_S + self.stale_s

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["decrypted", *ERRORS]),
    )
    def answer(self, data: st.DataObject, outcome: str) -> None:
        """A decryption ends."""
        self._end(data.draw(st.sampled_from(self.under_way)), outcome)

    def _end(self, call: Decryption, outcome: str) -> None:
        waiting = [
            o
            for o in self.all_openings
            if not o.ended and (o.path, o.version) == (call.file.path, call.file.version[3])
        ]
        call.outcome = outcome

        async def end() -> None:
            call.answered.set()

        self.trio.do(end)
        for opening in waiting:
            assert opening.ended, "a waiting open was not told"
            if outcome == "decrypted":
                assert opening.lease is not None or isinstance(opening.error, LockedMemoryExhausted)
            elif outcome == "unreachable":
                assert opening.lease is not None or isinstance(opening.error, KmsUnreachable)
            else:
                assert isinstance(opening.error, ERRORS[outcome])

    @rule(opening=openings)
    def close_or_give_up(self, opening: Opening) -> None:
        """A program closes the file, or the open is cancelled."""

        async def end() -> None:
            if opening.lease is not None:
                opening.lease.close()
                opening.lease.close()
                opening.closed = True
            else:
                opening.scope.cancel()

        self.trio.do(end)
        assert opening.ended

    @rule(seconds=st.sampled_from([0.5, 3.0, 4.0, 7.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.trio.advance(seconds)

    @precondition(lambda self: not self.cache.locked)
    @rule(open_meanwhile=st.booleans(), stay=st.integers(0, 3))
    def lock(self, open_meanwhile: bool, stay: int) -> None:
        """The volume is locked, more often than not for a moment only."""

        async def end_workers() -> None:
            await trio.lowlevel.checkpoint()

        self.trio.do(self.cache.lock, end_workers)
        self.served.clear()
        for opening in self.all_openings:
            opening.dead = True
            assert opening.ended, "an open waits over a lock"
        assert not self.under_way
        assert self.held() == []
        if open_meanwhile:
            opening = Opening("a", 1, self.now + OPEN_DEADLINE_S)
            self.trio.do(self._start_open, opening)
            assert isinstance(opening.error, VolumeLocked)
        if stay:
            self.unlock()

    @rule(steps=st.none() | st.integers(0, 3))
    def lock_and_unlock_at_once(self, steps: int | None) -> None:
        """As before, without a moment in between; perhaps just when decryptions succeed.

        Args:
            steps: how far those get before.
        """

        async def at_once() -> None:
            if steps is not None:
                for call in self.under_way:
                    call.outcome = "decrypted"
                    call.answered.set()
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()

            async def end_workers() -> None:
                pass

            await self.cache.lock(end_workers)
            assert (self.arena.used_bytes, self.arena.slots, self.cache.held()) == (0, 0, [])
            self.cache.unlock()

        waiting = [opening for opening in self.all_openings if not opening.ended]
        self.trio.do(at_once)
        self.served.clear()
        for opening in self.all_openings:
            opening.dead = True
        for opening in waiting:
            assert opening.ended
            assert opening.lease or isinstance(opening.error, VolumeLocked | LockedMemoryExhausted)

    @precondition(lambda self: self.cache.locked)
    @rule()
    def unlock(self) -> None:
        """The volume is unlocked."""

        async def unlock() -> None:
            self.cache.unlock()

        self.trio.do(unlock)

    @precondition(lambda self: not self.detached and len(self.all_openings) > 15)
    @rule()
    def detach(self) -> None:
        """The mount is detached, late in a run: it stays so for the rest of it."""

        async def detach() -> None:
            self.cache.detach()

        self.trio.do(detach)
        self.served.clear()
        self.detached = True

    # --- what holds always -----------------------------------------------------------------------

    @invariant()
    def leases_read_their_version_or_nothing(self) -> None:
        for opening in self.all_openings:
            if opening.lease is None or opening.closed:
                continue
            wanted = content_of_version(opening.path, opening.version)
            try:
                count = opening.lease.copy_to(self.buffer, 0, 3 * PAGE_BYTES)
            except VolumeLocked:
                assert opening.dead
                continue
            assert not opening.dead
            view = self.buffer.borrow(count)
            assert bytes(view) == wanted
            self.buffer.take_back(view)
            assert opening.lease.size_bytes == len(wanted)

    @invariant()
    def memory_is_accounted_for(self) -> None:
        held = self.held()
        used = [round_to_pages(e.size_bytes) for e in held if e.size_bytes]
        assert (self.arena.used_bytes, self.arena.slots) == (sum(used), len(used))
        assert self.arena.used_bytes <= self.arena.budget_bytes
        open_leases = [o for o in self.all_openings if o.lease and not o.closed and not o.dead]
        # A plaintext past its time is pinned by those who wait for a newer one.
        pins = sum(entry.leases for entry in held) - len(open_leases)
        assert 0 <= pins <= sum(not opening.ended for opening in self.all_openings)

    @invariant()
    def nothing_is_held_without_reason(self) -> None:
        held = self.held()
        if self.cache.locked:
            assert held == []
        for entry in held:
            if not entry.leases:
                assert entry.current
                assert entry.age_s < TTL_S + self.stale_s

    @invariant()
    def nobody_waits_beyond_the_deadline(self) -> None:
        for opening in self.all_openings:
            if opening.ended:
                # Given up by its program, or told how it ended.
                assert opening.lease or opening.error or opening.scope.cancel_called
            else:
                assert opening.deadline > self.now
                assert not self.cache.locked

    def teardown(self) -> None:
        if not hasattr(self, "trio"):
            return
        self.trio.close()
        self.buffer.close()
        assert (self.arena.used_bytes, self.arena.slots) == (0, 0)
        assert (locked_kib(), open_fds()) == (self.locked_kib, self.fds)


TestCacheStates = CacheMachine.TestCase
TestCacheStates.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
