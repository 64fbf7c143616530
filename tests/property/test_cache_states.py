"""The cache in every order of events, with real locked memory and a clock of the test's own."""

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

from kmsfs.errors import DeadlineExceeded, LockedMemoryExhausted, RolledBack, VolumeLocked
from kmsfs.memory.mapping import round_to_pages
from kmsfs.views.prefetch import open_once
from tests.support.cache_bench import OPEN_DEADLINE_S, CacheBench
from tests.support.cache_model import (
    ERRORS,
    PATHS,
    PLACES,
    TTL_S,
    Opening,
)
from tests.support.process_facts import locked_kib, open_fds


class CacheMachine(CacheBench, RuleBasedStateMachine):
    """Opens, answers, changes, time, refreshes and locks in any order; `model` knows the rules."""

    openings = Bundle("openings")

    @initialize(stale_s=st.sampled_from([0.0, 5.0, 20.0]))
    def begin(self, stale_s: float) -> None:
        self.set_up(stale_s)

    # --- what happens ----------------------------------------------------------------------------

    @rule(
        target=openings,
        path=st.sampled_from(PATHS),
        count=st.integers(1, 3),
        outcome=st.sampled_from(["", "", "decrypted", "decrypted", "decrypted", *ERRORS]),
        change=st.sampled_from(["", "", "newer", "older", "again", "back"]),
    )
    def open(self, path: str, count: int, outcome: str, change: str) -> object:
        """One or several programs open a file; its decryption, if any, may end at once.

        Args:
            change: before that the ciphertext was replaced: by the next version, an older one,
                the same encrypted again, or exactly what lay there before that.
        """
        self.change(path, change)
        new = []
        for _ in range(count):
            opening = Opening(path, self.now + OPEN_DEADLINE_S)
            self.all_openings.append(opening)
            new.append(opening)
            self.do(self.start_open, opening)
            self.check_begun(opening)
        for call in list(self.under_way):
            if (
                outcome
                and call.ciphertext == self.source.files[path]
                and not self.model.is_outdated(call)
            ):
                self.end(call, outcome)
        return multiple(*new)

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["decrypted", *ERRORS]),
    )
    def answer(self, data: st.DataObject, outcome: str) -> None:
        """A decryption ends."""
        self.end(data.draw(st.sampled_from(self.under_way)), outcome)

    @rule(place=st.sampled_from(PLACES), steps=st.none() | st.integers(0, 3))
    def refresh(self, place: str, steps: int | None) -> None:
        """KMS is to be asked anew for a file or a directory, perhaps just when decryptions succeed.

        Args:
            steps: how far those get before.
        """

        async def refresh() -> None:
            await self.let_succeed(steps)
            self.cache.retire(place)
            self.model.refresh(place)

        self.do(refresh)

    @precondition(lambda self: not self.cache.locked and not self.model.detached)
    @rule(place=st.sampled_from(PLACES), outcome=st.sampled_from(["decrypted", "unreachable"]))
    def refresh_accepting_older(self, place: str, outcome: str) -> None:
        """As before, and what lies there may be older than what was seen."""

        async def refresh() -> None:
            self.cache.retire(place)
            self.model.refresh(place)
            before = self.model.accept_older(place)
            paths = self.volume.versions.below(place)
            assert paths == sorted(before)
            self.at_once = outcome
            with self.volume.versions.accepting_older(paths):
                await open_once(self.volume, paths)
            self.at_once = ""
            self.model.accepted(before)

        self.do(refresh)

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

        self.do(end)
        assert opening.ended

    @rule(seconds=st.sampled_from([0.5, 3.0, 4.0, 7.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes; KMS is away for those whose deadline passes with it."""
        waiting = [opening for opening in self.all_openings if not opening.ended]
        self.trio.advance(seconds)
        for opening in waiting:
            if opening.ended and self.model.must_be_served_stale(opening):
                assert opening.given is opening.fallback
            elif opening.ended:
                assert isinstance(opening.error, DeadlineExceeded)
        self.note_time()

    @precondition(lambda self: not self.cache.locked)
    @rule(path=st.sampled_from(PATHS), outcome=st.sampled_from(["decrypted", *ERRORS]))
    def a_newer_version_overtakes(self, path: str, outcome: str) -> None:
        """It comes and is decrypted while the one that lay there before still is."""
        self.open(path, 1, "", "again")
        older = [call for call in self.under_way if call.ciphertext == self.source.files[path]]
        self.open(path, 1, "decrypted", "newer")
        for call in older:
            self.end(call, outcome)

    @precondition(lambda self: not self.cache.locked)
    @rule(paths=st.permutations(PATHS))
    def use_one_after_another(self, paths: list[str]) -> None:
        """A program reads one file after another: which were used last may stay."""
        for path in paths:
            self.open(path, 1, "decrypted", "")
            self.close_or_give_up(self.all_openings[-1])
            self.pass_time(0.5)

    @precondition(lambda self: not self.cache.locked)
    @rule(
        path=st.sampled_from(PATHS),
        outcome=st.sampled_from(["decrypted", *ERRORS]),
        refresh=st.booleans(),
    )
    def ask_again(self, path: str, outcome: str, refresh: bool) -> None:
        """A plaintext passes its time in a program's hands, and KMS is asked for it again.

        Args:
            refresh: whether it is refreshed before the answer.
        """
        self.open(path, 1, "decrypted", "")
        self.pass_time(TTL_S)
        self.open(path, 1, "", "")
        if refresh:
            self.refresh(path, None)
        for call in list(self.under_way):
            if call.ciphertext == self.source.files[path]:
                self.end(call, outcome)

    @precondition(lambda self: not self.cache.locked)
    @rule(path=st.sampled_from(PATHS), outcome=st.sampled_from(["decrypted", *ERRORS]))
    def answers_overtake_one_another(self, path: str, outcome: str) -> None:
        """What KMS is asked anew comes before the answer to what it was asked before a refresh."""
        self.open(path, 1, "", "")
        self.refresh(path, None)
        self.open(path, 1, "decrypted", "")
        for call in list(self.under_way):
            if call.ciphertext == self.source.files[path]:
                self.end(call, outcome)

    @rule(path=st.sampled_from(PATHS))
    def open_while_kms_hangs(self, path: str) -> None:
        """A program opens a file, and KMS lets its deadline pass."""
        self.open(path, 1, "", "")
        self.pass_time(OPEN_DEADLINE_S)

    @precondition(lambda self: not self.cache.locked)
    @rule(open_meanwhile=st.booleans(), stay=st.integers(0, 3), refresh=st.booleans())
    def lock(self, open_meanwhile: bool, stay: int, refresh: bool) -> None:
        """The volume is locked, more often than not for a moment only.

        Args:
            refresh: whether it was refreshed just before, while something is decrypted.
        """
        if refresh:
            self.open(PATHS[0], 1, "", "again")
            self.refresh("", None)

        async def end_workers() -> None:
            await trio.lowlevel.checkpoint()

        self.do(self.cache.lock, end_workers)
        self.model.lock(self.all_openings)
        for opening in self.all_openings:
            assert opening.ended, "an open waits over a lock"
        assert not self.under_way
        assert self.held() == []
        if open_meanwhile:
            opening = Opening(PATHS[0], self.now + OPEN_DEADLINE_S)
            self.do(self.start_open, opening)
            assert isinstance(opening.error, VolumeLocked)
        if stay:
            self.unlock()

    @rule(steps=st.none() | st.integers(0, 3))
    def lock_and_unlock_at_once(self, steps: int | None) -> None:
        """As before, without a moment in between; perhaps just when decryptions succeed.

        Args:
            steps: how far those get before.
        """

        async def at_once() -> int:
            await self.let_succeed(steps)

            async def end_workers() -> None:
                pass

            await self.cache.lock(end_workers)
            assert (self.arena.used_bytes, self.arena.slots, self.cache.held()) == (0, 0, [])
            at = self.model.lock(self.all_openings)
            self.cache.unlock()
            return at

        waiting = [opening for opening in self.all_openings if not opening.ended]
        at = self.do(at_once)
        for opening in waiting:
            # Those whose ciphertext was replaced are tried once more, as late as after the unlock.
            tried_again = opening.began > at
            opening.dead = not tried_again
            assert opening.ended or tried_again
            assert (
                not opening.ended
                or opening.lease
                or isinstance(opening.error, VolumeLocked | LockedMemoryExhausted | RolledBack)
            )

    @precondition(lambda self: self.cache.locked)
    @rule()
    def unlock(self) -> None:
        """The volume is unlocked."""

        async def unlock() -> None:
            self.cache.unlock()

        self.do(unlock)

    @precondition(lambda self: not self.model.detached and len(self.all_openings) > 15)
    @rule()
    def detach(self) -> None:
        """The mount is detached, late in a run: it stays so for the rest of it."""

        async def detach() -> None:
            self.cache.detach()

        self.do(detach)
        self.model.detach()

    # --- what holds always -----------------------------------------------------------------------

    @invariant()
    def leases_read_their_version_or_nothing(self) -> None:
        for opening in self.all_openings:
            if opening.lease is None or opening.closed:
                continue
            try:
                content = self.content_of(opening)
            except VolumeLocked:
                assert opening.dead
                continue
            assert not opening.dead
            assert opening.given is not None
            assert content == opening.given.content
            assert opening.lease.size_bytes == len(content)

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
        served = self.model.served
        for entry in held:
            if not entry.leases:
                assert entry.current
                assert not self.model.has_expired(served[entry.path])
        current = {entry.path for entry in held if entry.current}
        assert current <= served.keys()
        for path, call in served.items():
            assert path in current or self.model.has_expired(call), "wiped without need"

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
