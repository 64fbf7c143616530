"""A cache between programs, KMS and ciphertexts that a test plays, held to `cache_model`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import trio

from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import DeadlineExceeded, KmsfsError, LockedMemoryExhausted, VolumeLocked
from kmsfs.events import Event, Wiped
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.arena import Arena
from kmsfs.memory.mapping import LockedMapping, round_to_pages
from kmsfs.settings import CacheSettings
from kmsfs.store.lease import CachedFile
from tests.support.cache_model import (
    ERRORS,
    IDLE_S,
    MAX_CONTENT_BYTES,
    NO_VERDICT,
    PATHS,
    SIZED,
    TTL_S,
    UNBOUND,
    CacheModel,
    Decryption,
    Opening,
    content_size,
    error_of,
    pages_of,
)
from tests.support.guest_trio import GuestTrio
from tests.support.process_facts import locked_kib, open_fds
from tests.support.scripted_volume import Ciphertext, ScriptedSource, scripted_volume
from tests.support.secret_memory import adopt

OPEN_DEADLINE_S = 8.0
BUDGET_PAGES = 4


class CacheBench:
    """A volume's cache, everybody around it, and what the model makes of them.

    Attributes:
        under_way: decryptions that wait for `end`.
        all_openings: every open so far.
        at_once: what decryptions come to without being waited for; empty if they wait.
    """

    def set_up(self, stale_s: float) -> None:
        """Start the cache."""
        self.fds, self.locked_kib = open_fds(), locked_kib()
        self.trio = GuestTrio()
        self.model = CacheModel(self.trio.clock.current_time, stale_s)
        self.arena = Arena(BUDGET_PAGES * PAGE_BYTES)
        self.buffer = LockedMapping.anonymous(MAX_CONTENT_BYTES)
        self.source = ScriptedSource(
            {path: Ciphertext(path) for path in PATHS},
            self._note_lookup,
            lambda found: content_size(found) if found.path == SIZED else None,
        )
        self.volume = scripted_volume(
            self.source,
            self.decrypt,
            arena=self.arena,
            cache=CacheSettings(ttl_s=TTL_S, idle_s=IDLE_S, stale_s=stale_s),
            events=self,
        )
        self.cache = self.volume.cache
        self.under_way: list[Decryption] = []
        self.all_openings: list[Opening] = []
        self.by_task: dict[trio.lowlevel.Task, Opening] = {}
        # What decryptions come to without being waited for.
        self.at_once = ""
        self._evictions = 0
        self._found_wrong: AssertionError | None = None
        self.do(self._start)

    async def _start(self) -> None:
        await self.trio.nursery.start(self.cache.run)

    def do(self, call: Callable[..., Any], *args: Any) -> Any:
        """Have something happen, and everything that follows from it."""
        try:
            return self.trio.do(call, *args)
        finally:
            self.note_time()

    def note_time(self) -> None:
        """After each thing that happens."""
        self.model.note_use(self.all_openings)
        if self._found_wrong is not None:
            raise self._found_wrong

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """What is found wrong here is raised by `do`: to the cache it is one more bad file."""
        try:
            yield
        except AssertionError as error:
            self._found_wrong = self._found_wrong or error
            raise

    def emit(self, event: Event) -> None:
        """EventSink."""
        if isinstance(event, Wiped) and event.reason == "evicted":
            self._evictions += 1
            with self._noted():
                self.model.evicted(event.path, self.all_openings)

    @property
    def now(self) -> float:
        """The clock."""
        return self.trio.clock.current_time()

    def held(self) -> list[CachedFile]:
        """What the cache says it holds."""

        async def ask() -> list[CachedFile]:
            return self.cache.held()

        held: list[CachedFile] = self.do(ask)
        return held

    # --- the part of the decryptor ---------------------------------------------------------------

    async def decrypt(self, ciphertext: Ciphertext, deadline: float) -> Plaintext:
        """`Decryptor`: waits for `answer`."""
        with self._noted():
            for other in self.under_way:
                assert other.ciphertext != ciphertext or self.model.is_outdated(other), "two"
        call = self.model.begins(ciphertext)
        self.under_way.append(call)
        try:
            with trio.move_on_at(deadline):
                if self.at_once:
                    call.outcome = self.at_once
                else:
                    await call.answered.wait()
                plaintext = self._result(call)
                # As when the worker has been thanked: cancelling comes too late.
                await trio.lowlevel.cancel_shielded_checkpoint()
                self.model.decrypted(call)
                return plaintext
            call.outcome = "late"
            self.model.failed(call)
            raise DeadlineExceeded("late")
        finally:
            self.under_way.remove(call)

    def _result(self, call: Decryption) -> Plaintext:
        if call.outcome != "decrypted":
            self.model.failed(call)
            raise ERRORS[call.outcome]("as the test wants it")
        evictions = self._evictions
        try:
            slot = call.slot = adopt(self.arena, call.content)
        except LockedMemoryExhausted:
            call.outcome = "no memory"
            held = sum(
                round_to_pages(entry.size_bytes)
                for entry in self.cache.held()
                if entry.leases and entry.size_bytes
            )
            # Others may have their memory already, and be on the way into the cache.
            held += sum(other.slot.mapped_bytes for other in self.under_way if other.slot)
            with self._noted():
                assert self._evictions == evictions, "in vain"
                assert held + pages_of(call.ciphertext) > self.arena.budget_bytes
            raise
        number = None if call.ciphertext.path == UNBOUND else call.ciphertext.number
        return Plaintext(slot, "arn:key", "test", bound_version=number)

    # --- programs ---------------------------------------------------------------------------------

    def change(self, path: str, how: str) -> None:
        """Replace what lies at a path; see the rule `open`."""
        found = self.source.files[path]
        number, copy = found.number, found.copy
        match how:
            case "newer":
                number += 1
            case "older":
                number = max(1, number - 1)
            case "again":
                copy += 1
            case "back":
                copy = max(0, copy - 1)
        self.source.files[path] = Ciphertext(path, number, copy)

    async def start_open(self, opening: Opening) -> None:
        """A program opens a file."""
        self.trio.nursery.start_soon(self._open, opening)

    async def _open(self, opening: Opening) -> None:
        self.by_task[trio.lowlevel.current_task()] = opening
        try:
            with opening.scope:
                opened = await self.volume.open_file(opening.path, opening.deadline)
                opening.lease = opened.lease
                assert not self.cache.locked
                content = self.content_of(opening)
                self.model.check_given(opening, content, from_cache=opened.from_cache)
        except KmsfsError as error:
            opening.error = error
        finally:
            opening.ended = True
            del self.by_task[trio.lowlevel.current_task()]

    def _note_lookup(self, found: Ciphertext) -> None:
        opening = self.by_task.get(trio.lowlevel.current_task())
        self.model.opens(opening or Opening(found.path, 0.0), found)

    def check_begun(self, opening: Opening) -> None:
        """An open has begun, and gone as far as it gets."""
        if self.cache.locked:
            assert isinstance(opening.error, VolumeLocked)
            return
        known = opening.fallback
        if known is not None and self.now < known.ready_at + TTL_S:
            assert opening.given is not None, "what is there is not served"
            return
        joined = any(
            (call.ciphertext, call.refreshed) == (opening.wanted, opening.refreshed)
            and call.began < opening.began
            for call in self.under_way
        )
        could_know = opening.path == SIZED and known is None and not joined
        if could_know and not self.model.has_room(
            opening, self.all_openings, self.arena.budget_bytes
        ):
            assert isinstance(opening.error, LockedMemoryExhausted)
        else:
            assert not opening.ended, "it cannot know yet"

    def content_of(self, opening: Opening) -> bytes:
        """What its lease reads.

        Raises:
            VolumeLocked.
        """
        assert opening.lease is not None
        count = opening.lease.copy_to(self.buffer, 0, MAX_CONTENT_BYTES)
        view = self.buffer.borrow(count)
        try:
            return bytes(view)
        finally:
            self.buffer.take_back(view)

    def end(self, call: Decryption, outcome: str) -> None:
        """Have a decryption end, and look at what those who wait for it are told."""
        waiting = [
            opening
            for opening in self.all_openings
            if not opening.ended
            and (opening.wanted, opening.refreshed) == (call.ciphertext, call.refreshed)
        ]
        call.outcome = outcome

        async def end() -> None:
            call.answered.set()

        self.do(end)
        for opening in waiting:
            self._check_told(opening, call)

    def _check_told(self, opening: Opening, call: Decryption) -> None:
        if call.outcome == "replaced":
            # It is tried once more with what lies there now.
            assert opening.began > (call.ended or 0)
            assert not isinstance(opening.error, error_of(call))
            return
        assert opening.ended, "a waiting open was not told"
        if call.outcome == "decrypted":
            assert opening.given is call or not call.content
        elif call.outcome in NO_VERDICT and self.model.must_be_served_stale(opening):
            assert opening.given is opening.fallback
        elif call.outcome == "no memory":
            assert isinstance(opening.error, LockedMemoryExhausted)
        else:
            assert isinstance(opening.error, error_of(call))

    async def let_succeed(self, steps: int | None) -> None:
        """Have all decryptions get so many steps towards a good end; None: not begin to."""
        if steps is not None:
            for call in self.under_way:
                call.outcome = "decrypted"
                call.answered.set()
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
