"""What a cache of plaintexts may, must and must not do, in the fewest words that can be wrong.

Nothing here looks into the cache: what is known is what was opened, what KMS answered, what
programs were given and what was asked of the volume, in the order of `moment`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kmsfs.errors import (
    CiphertextChanging,
    CiphertextInvalid,
    KeyAccessDenied,
    KmsfsError,
    KmsUnreachable,
    RolledBack,
    WorkerFailed,
)
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.arena import Slot
from kmsfs.memory.mapping import round_to_pages
from kmsfs.store.lease import Lease
from kmsfs.store.names import is_at_or_below
from tests.support.scripted_volume import Ciphertext

TTL_S, IDLE_S = 10.0, 4.0
MAX_CONTENT_BYTES = 3 * PAGE_BYTES

# A name that begins like a directory's, and is not in it.
PATHS = ("d/a", "d/b", "dx")
PLACES = ("", "d", *PATHS)
UNBOUND = "dx"
# Its plaintext's size is known before KMS is asked.
SIZED = "d/b"

ERRORS: dict[str, type[KmsfsError]] = {
    "refused": KeyAccessDenied,
    "unreachable": KmsUnreachable,
    "worker death": WorkerFailed,
    "corrupt": CiphertextInvalid,
}

NO_VERDICT = ("unreachable", "worker death")
"""Outcomes that say nothing of the file and its key."""


@dataclass(eq=False)
class Decryption:
    """One call of the decryptor, waiting for the test's word.

    Attributes:
        began: at which moment; tells it from all others.
        refreshed: when its path had last been refreshed by then.
        seen: the highest version of its path that had been seen by then.
        ready_at: when it ended well, on the clock; None before that.
        used_at: when a program last had its plaintext open, or could have.
        in_use: whether one has it open.
    """

    ciphertext: Ciphertext
    began: int
    refreshed: int
    seen: int
    answered: trio.Event = field(default_factory=trio.Event)
    outcome: str = ""
    ended: int | None = None
    slot: Slot | None = None
    ready_at: float = 0.0
    used_at: float = 0.0
    in_use: bool = False

    @property
    def content(self) -> bytes:
        """From nothing to three pages; what is not empty is like that of no other decryption."""
        wanted = self.ciphertext
        size_bytes = content_size(wanted)
        mark = f"{wanted.path} {wanted.number} {wanted.copy} {self.began}|".encode()
        return (mark * (size_bytes // len(mark) + 1))[:size_bytes]


def content_size(ciphertext: Ciphertext) -> int:
    """How large its plaintext is."""
    if ciphertext.number % 5 == 4:
        return 0
    spread = ciphertext.number * 1777 + PATHS.index(ciphertext.path) * 4911
    return 64 + spread % (MAX_CONTENT_BYTES - 64)


def pages_of(ciphertext: Ciphertext) -> int:
    """What its plaintext costs of the budget, in bytes."""
    size_bytes = content_size(ciphertext)
    return round_to_pages(size_bytes) if size_bytes else 0


@dataclass(eq=False)
class Opening:
    """One open: under way, or with its lease or error.

    Attributes:
        began: at which moment it asked the cache, the last time if more than once.
        wanted: what lay at the path then.
        refreshed: when the path had last been refreshed by then.
        fallback: what was served before, and is past its time.
    """

    path: str
    deadline: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    began: int = 0
    wanted: Ciphertext | None = None
    refreshed: int = 0
    fallback: Decryption | None = None
    given: Decryption | None = None
    lease: Lease | None = None
    error: KmsfsError | None = None
    ended: bool = False
    dead: bool = False
    closed: bool = False

    @property
    def reads(self) -> Decryption | None:
        """Whose plaintext it keeps from being wiped."""
        if self.dead or self.closed:
            return None
        return self.given if self.ended else self.fallback


class CacheModel:
    """The rules: rotation, refresh, lifetimes, refusals, bad ciphertext, rollback, lock.

    Args:
        clock: the present, in seconds.
    """

    def __init__(self, clock: Callable[[], float], stale_s: float) -> None:
        self._clock = clock
        self._moment = 0
        self.stale_s = stale_s
        self.detached = False
        # By path: what later opens may be given.
        self.served: dict[str, Decryption] = {}
        self.calls: dict[int, Decryption] = {}
        self._highest: dict[str, int] = {}
        self._refreshed: dict[str, int] = {}
        self._failed: dict[Ciphertext, int] = {}

    def _next(self) -> int:
        self._moment += 1
        return self._moment

    # --- what happens ----------------------------------------------------------------------------

    def opens(self, opening: Opening, found: Ciphertext) -> None:
        """An open asks for what lies at its path."""
        before = self.served.get(found.path)
        if before is not None and (before.ciphertext != found or self.has_expired(before)):
            # Also once another version was asked for: if the former comes back it is another one.
            del self.served[found.path]
            before = None
        opening.began, opening.wanted = self._next(), found
        opening.refreshed = self._refreshed.get(found.path, 0)
        opening.fallback = before

    def begins(self, ciphertext: Ciphertext) -> Decryption:
        """A decryption begins."""
        path = ciphertext.path
        refreshed, seen = self._refreshed.get(path, 0), self._highest.get(path, 0)
        call = Decryption(ciphertext, self._next(), refreshed, seen)
        self.calls[call.began] = call
        return call

    def is_outdated(self, call: Decryption) -> bool:
        """Whether the path was refreshed since it began."""
        return call.began < self._refreshed.get(call.ciphertext.path, 0)

    def decrypted(self, call: Decryption) -> None:
        """KMS has given a plaintext; see `verdict` for what becomes of it."""
        path = call.ciphertext.path
        call.ended = self._next()
        refusal = self._refusal(call)
        if refusal is not None:
            call.outcome = refusal
            self._is_bad(call)
            return
        if path != UNBOUND:
            self._highest[path] = max(call.ciphertext.number, self._highest.get(path, 0))
        call.ready_at = call.used_at = self._clock()
        if not self.detached and not self.is_outdated(call):
            self.served[path] = call

    def _refusal(self, call: Decryption) -> str | None:
        number, path = call.ciphertext.number, call.ciphertext.path
        if path == UNBOUND or number >= self._highest.get(path, 0):
            return None
        return "replaced" if number >= call.seen else "rolled back"

    def failed(self, call: Decryption) -> None:
        """It has failed, as its outcome says."""
        call.ended = self._next()
        path = call.ciphertext.path
        if call.outcome == "refused":
            self.served.pop(path, None)
        elif call.outcome == "corrupt":
            self._is_bad(call)
        elif call.outcome in (*NO_VERDICT, "late"):
            self._failed[call.ciphertext] = call.ended

    def _is_bad(self, call: Decryption) -> None:
        """Bad ciphertext says nothing of another, nor of what KMS was asked anew since."""
        before = self.served.get(call.ciphertext.path)
        is_of_it = before is not None and before.ciphertext == call.ciphertext
        if is_of_it and not self.is_outdated(call):
            del self.served[call.ciphertext.path]

    def refresh(self, place: str) -> None:
        """KMS is to be asked anew for what lies at or below a path."""
        moment = self._next()
        for path in PATHS:
            if is_at_or_below(path, place):
                self._refreshed[path] = moment
                self.served.pop(path, None)

    def accept_older(self, place: str) -> dict[str, int]:
        """Forget which versions were seen; returns what `accepted` is to be told."""
        below = [path for path in self._highest if is_at_or_below(path, place)]
        return {path: self._highest.pop(path) for path in below}

    def accepted(self, before: dict[str, int]) -> None:
        """What has not come meanwhile is as it was."""
        self._highest = {**before, **self._highest}

    def lock(self, openings: list[Opening]) -> int:
        """The volume is locked: returns at which moment. Who asked before gets nothing any more."""
        self.served.clear()
        for opening in openings:
            opening.dead = True
        return self._next()

    def detach(self) -> None:
        """The mount is gone: nothing is kept that is not open."""
        self.served.clear()
        self.detached = True

    def evicted(self, path: str, openings: list[Opening]) -> None:
        """A plaintext makes room for another."""
        victim = self.served.pop(path, None)
        assert victim is not None, "what is not served is wiped anyway"
        in_use = {opening.reads for opening in openings}
        assert victim not in in_use, "it is open"
        for call in self.served.values():
            if call not in in_use and not self.has_expired(call):
                assert call.used_at >= victim.used_at, "another was used before"

    # --- what must hold --------------------------------------------------------------------------

    def check_given(self, opening: Opening, content: bytes, *, from_cache: bool) -> None:
        """A program is given this plaintext."""
        wanted, now = opening.wanted, self._clock()
        assert wanted is not None
        if not content:
            # Nothing tells one empty plaintext from another.
            assert content_size(wanted) == 0
            opening.given = opening.fallback if from_cache else self._last_of(wanted)
        else:
            opening.given = self.calls[int(content.split(b"|")[0].split(b" ")[-1])]
        given = opening.given
        assert given is not None, "from the cache, which had none"
        assert given.content == content
        assert given.ciphertext == wanted, "another version than the one that was opened"
        assert given.began > opening.refreshed, "what was decrypted before a refresh"
        if not from_cache:
            assert given.ended is not None
            assert given.ended > opening.began, "from before, and not called so"
            return
        assert self.served.get(wanted.path) is given, "after it was refused, rotated or refreshed"
        assert now < given.ready_at + TTL_S + self.stale_s
        if now >= given.ready_at + TTL_S:
            has_failed = self._failed.get(wanted, 0) > opening.began or now >= opening.deadline
            assert has_failed, "stale, and KMS was not asked in vain"

    def _last_of(self, ciphertext: Ciphertext) -> Decryption:
        ended = [
            call
            for call in self.calls.values()
            if call.ciphertext == ciphertext and call.ended and call.outcome == "decrypted"
        ]
        return max(ended, key=lambda call: call.ended or 0)

    def must_be_served_stale(self, opening: Opening) -> bool:
        """Whether an open gets what it was served before, now that there was no verdict."""
        fallback = opening.fallback
        return (
            fallback is not None
            and self.served.get(opening.path) is fallback
            and self._clock() < fallback.ready_at + TTL_S + self.stale_s
        )

    def has_room(self, opening: Opening, openings: list[Opening], budget_bytes: int) -> bool:
        """Whether its plaintext fits beside what is open."""
        assert opening.wanted is not None
        in_use = {other.reads for other in openings} - {None}
        used_bytes = sum(pages_of(call.ciphertext) for call in in_use if call is not None)
        return used_bytes + pages_of(opening.wanted) <= budget_bytes

    def note_use(self, openings: list[Opening]) -> None:
        """After each step: who has what open now."""
        now = self._clock()
        read = {opening.reads for opening in openings}
        for call in self.calls.values():
            if call in read or call.in_use:
                call.used_at = now
            call.in_use = call in read

    def has_expired(self, call: Decryption) -> bool:
        """Whether nothing may hold its plaintext any more."""
        now = self._clock()
        over = now >= call.ready_at + TTL_S + self.stale_s or now >= call.used_at + IDLE_S
        return over and not call.in_use


def error_of(call: Decryption) -> type[KmsfsError]:
    """What its failure is for those who wait."""
    if call.outcome == "rolled back":
        return RolledBack
    return CiphertextChanging if call.outcome == "replaced" else ERRORS[call.outcome]
