"""Plaintext entries: one decryption in flight per version, lifetimes, leases, lock.

Not thread-safe: everything here runs on the event loop, and state changes between awaits only.
"""

import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from kmsfs.decryptor.breaker import is_failure
from kmsfs.decryptor.client import MAX_CALLS, Plaintext
from kmsfs.errors import (
    CiphertextInvalid,
    DeadlineExceeded,
    ExitCode,
    KmsfsError,
    LockedMemoryExhausted,
    TooManyWaiting,
    VolumeLocked,
    WorkerBug,
)
from kmsfs.events import Decrypted, DecryptFailed, EventSink, Wiped
from kmsfs.memory import process
from kmsfs.memory.arena import Arena
from kmsfs.settings import CacheSettings
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.flight import Flight
from kmsfs.store.history import FileHistory
from kmsfs.store.lease import CachedFile, Entry, Lease
from kmsfs.store.names import is_at_or_below
from kmsfs.store.source import SourceFile

# Opens that may wait for a decryption; the kernel has 1024 requests for us (`max_tasks`), and
# the other half stays free for everything that does not wait.
MAX_WAITING: Final = 512

# Errors that say no for good; whatever was decrypted before is not served any more.
_PURGING: Final = frozenset({ExitCode.REFUSED_BY_KMS, ExitCode.NOT_AUTHENTIC})

DecryptFile = Callable[[SourceFile, float], Awaitable[Plaintext]]


class PlaintextCache:
    """Holds plaintexts for as long as the settings allow, and not longer.

    A plaintext serves new opens for `ttl_s` after its decryption (0: for ever). Without leases
    it is wiped then, or `idle_s` after its last close, whichever comes first; with `stale_s` it
    is kept that much longer for the case that KMS cannot be reached. A lease keeps it until it
    is closed.

    Args:
        decrypt: decrypts a file by a deadline (trio's clock); raises KmsfsError.
    """

    def __init__(
        self, arena: Arena, settings: CacheSettings, events: EventSink, decrypt: DecryptFile
    ) -> None:
        self._settings = settings
        self._events = events
        self._decrypt = decrypt
        self._current: dict[str, Entry] = {}
        self._entries: set[Entry] = set()
        self._flights: dict[tuple[str, FileVersion], Flight] = {}
        # Those that nobody joins any more.
        self._outdated: set[Flight] = set()
        self.max_decryptions: Final = process.descriptors_for_ciphertext(at_least=MAX_CALLS)
        self._waiting = 0
        self._nursery: trio.Nursery | None = None
        self._sweep_again = trio.Event()
        self._next_sweep = math.inf
        self._detached = False
        self.locked = False
        self.history: Final = FileHistory()
        arena.reclaim = self._evict
        self._arena = arena

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Decrypt and expire until cancelled; everything is wiped then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    again = self._sweep_again
                    with trio.CancelScope(deadline=self._sweep(trio.current_time())):
                        await again.wait()
        finally:
            self._nursery = None
            self.wipe_all("end")

    async def acquire(self, file: SourceFile, deadline: float) -> tuple[Lease, bool]:
        """A lease on this version's plaintext, and whether it was there already.

        Any number of callers share one decryption. The caller closes the lease.

        Args:
            deadline: on trio's clock.

        Raises:
            VolumeLocked, TooManyWaiting, DeadlineExceeded, CiphertextChanging, and whatever the
            decryption raises.
            LockedMemoryExhausted: what is open leaves no room. Without asking KMS where the
                plaintext's size is known; else when KMS has answered.
        Cancellation: leaves the decryption running for others and for the next open.
        """
        if self.locked:
            raise VolumeLocked("the volume is locked")
        entry = self._current_entry(file)
        if entry is not None and not self._is_over(entry):
            return self._lease(entry), True
        error = self._impossible(file)
        # Others may wait for it already; or it may be served stale, if KMS cannot be asked.
        is_tried = entry is not None or (file.path, file.version) in self._flights
        if error is not None and (file.problem or not is_tried):
            self.history.note_failure(file.path, error)
            raise error
        if self._waiting >= MAX_WAITING:
            raise TooManyWaiting(f"{MAX_WAITING} opens wait already")
        flight = self._flight_for(file, deadline)
        return await self._join(flight, entry, deadline)

    async def lock(self, end_workers: Callable[[], Awaitable[None]]) -> None:
        """No new leases; decryptions cancelled; `end_workers` awaited; every slot wiped.

        Raises:
            KmsfsError: what `end_workers` raised; every slot is wiped all the same.
        """
        self.locked = True
        flights = [*self._flights.values(), *self._outdated]
        for flight in flights:
            flight.error = VolumeLocked("the volume was locked meanwhile")
            flight.scope.cancel()
        try:
            await end_workers()
            for flight in flights:
                await flight.done.wait()
        finally:
            self.wipe_all("lock")

    def unlock(self) -> None:
        """Serve again. Leases given before the lock stay dead."""
        self.locked = False

    def wipe_all(self, reason: str) -> None:
        """Wipe every plaintext, leases or not."""
        for entry in list(self._entries):
            self._wipe(entry, reason)

    def retire(self, place: str) -> None:
        """Have the next open of each file at or below a path ask KMS anew.

        What is open stays readable until its last close; everything else is wiped now.
        """
        for entry in list(self._current.values()):
            if is_at_or_below(entry.path, place):
                self._retire(entry, "refreshed")
        for key, flight in list(self._flights.items()):
            if is_at_or_below(flight.file.path, place):
                flight.outdated = True
                self._outdated.add(self._flights.pop(key))

    def detach(self) -> None:
        """From now on hold only what is open: wipe the rest, and everything at its last close."""
        self._detached = True
        for entry in list(self._entries):
            self._retire(entry, "unmounted")

    def held(self) -> list[CachedFile]:
        """What is held now."""
        now = trio.current_time()
        return [
            CachedFile(
                path=entry.path,
                size_bytes=entry.slot.size_bytes,
                age_s=now - entry.ready_at,
                leases=entry.leases,
                current=entry.current,
                stale=entry.current and self._is_over(entry),
            )
            for entry in sorted(self._entries, key=lambda e: e.path)
        ]

    def is_stale(self, path: str) -> bool:
        """Whether what is held of a file is past its time: served only if KMS cannot be asked."""
        entry = self._current.get(path)
        return entry is not None and self._is_over(entry)

    def memory_kinds(self) -> set[str]:
        """Which kinds of memory the plaintexts held now lie in."""
        return {entry.slot.kind for entry in self._entries if entry.slot.size_bytes}

    # --- decrypting --------------------------------------------------------------------------

    def _current_entry(self, file: SourceFile) -> Entry | None:
        entry = self._current.get(file.path)
        if entry is not None and entry.version != file.version:
            self._retire(entry, "newer version")
            return None
        return entry

    def _is_over(self, entry: Entry) -> bool:
        return trio.current_time() >= entry.ready_at + self._settings.lifetime_s

    def _impossible(self, file: SourceFile) -> KmsfsError | None:
        """Why a file cannot be decrypted now, whatever KMS says."""
        if file.problem:
            return CiphertextInvalid(file.problem)
        if not file.size_exact or file.size_bytes > self._settings.max_file_bytes:
            return None
        # What is on its way into the cache may be closed by then, and leave.
        in_use = [entry.slot for entry in self._entries if entry.leases]
        if self._arena.fits_beside(file.size_bytes, in_use):
            return None
        return LockedMemoryExhausted(f"{file.size_bytes} bytes do not fit beside what is open")

    def _flight_for(self, file: SourceFile, deadline: float) -> Flight:
        key = (file.path, file.version)
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) + len(self._outdated) >= self.max_decryptions:
                raise TooManyWaiting(
                    f"no descriptors for more than {self.max_decryptions} files at once",
                    hint="raise the limit of descriptors (LimitNOFILE, ulimit -n)",
                )
            assert self._nursery is not None, "run() is not running"
            flight = self._flights[key] = Flight(file)
            self._nursery.start_soon(self._fly, flight, deadline)
        return flight

    async def _join(
        self, flight: Flight, stale: Entry | None, deadline: float
    ) -> tuple[Lease, bool]:
        # A lease of our own keeps a stale plaintext from being wiped while we wait.
        fallback = self._lease(stale) if stale is not None else None
        self._waiting += 1
        flight.waiting += 1
        try:
            with trio.CancelScope(deadline=deadline):
                await flight.done.wait()
            if flight.entry is not None:
                if self.locked or flight.entry.wiped:
                    raise VolumeLocked("the volume was locked meanwhile")
                return self._lease(flight.entry), False
            error = flight.error or self._unfinished()
            if fallback is not None and self._may_serve_stale(stale, error):
                lease, fallback = fallback, None
                return lease, True
            raise error
        finally:
            self._waiting -= 1
            flight.waiting -= 1
            self._unpin(flight)
            if fallback is not None:
                fallback.close()

    def _unfinished(self) -> KmsfsError:
        if self.locked:
            return VolumeLocked("the volume was locked meanwhile")
        return DeadlineExceeded("no answer from KMS within the deadline")

    def _may_serve_stale(self, entry: Entry | None, error: KmsfsError) -> bool:
        if entry is None or entry.wiped or not entry.current:
            return False
        ends_at = entry.ready_at + self._settings.lifetime_s + self._settings.stale_s
        return is_failure(error) and trio.current_time() < ends_at

    async def _fly(self, flight: Flight, deadline: float) -> None:
        file = flight.file
        started = trio.current_time()
        try:
            with flight.scope:
                plaintext = await self._decrypt(file, deadline)
                self._land(flight, plaintext, trio.current_time() - started)
        except KmsfsError as error:
            self._fail(flight, error, trio.current_time() - started)
        except Exception as error:  # noqa: BLE001 - one bad file must not end the whole mount
            # The class name only: a foreign exception's text may hold content.
            bug = WorkerBug(f"{type(error).__name__} while decrypting")
            self._fail(flight, bug, trio.current_time() - started)
        finally:
            if flight.outdated:
                self._outdated.discard(flight)
            else:
                del self._flights[file.path, file.version]
            flight.done.set()

    def _fail(self, flight: Flight, error: KmsfsError, duration_s: float) -> None:
        path = flight.file.path
        flight.error = flight.error or error
        current = self._current.get(path)
        is_newer = current is not None and (
            flight.outdated or current.version != flight.file.version
        )
        if is_newer and error.exit_code is not ExitCode.REFUSED_BY_KMS:
            # What was decrypted meanwhile is served, and nothing is the matter with it.
            current = None
        else:
            self.history.note_failure(path, error)
        self._events.emit(
            DecryptFailed(path=path, error=error.code, detail=error.detail, duration_s=duration_s)
        )
        if current is not None and error.exit_code in _PURGING:
            self._retire(current, error.code)

    def _land(self, flight: Flight, plaintext: Plaintext, duration_s: float) -> None:
        if self.locked:
            plaintext.slot.wipe()
            return
        now = trio.current_time()
        file = flight.file
        older = self._current.get(file.path)
        if older is not None and not flight.outdated:
            self._retire(older, "decrypted anew")
        entry = Entry(file.path, file.version, plaintext.slot, ready_at=now, idle_from=now)
        # Pinned until everybody who waits has a lease of their own.
        entry.leases = 1
        flight.entry = entry
        entry.current = not (self._detached or flight.outdated)
        self._entries.add(entry)
        if entry.current:
            self._current[file.path] = entry
        self.history.note_success(file, plaintext)
        self._events.emit(
            Decrypted(
                path=file.path,
                size_bytes=plaintext.slot.size_bytes,
                duration_s=duration_s,
                key_id=plaintext.key_arn,
                format=plaintext.format,
            )
        )
        if flight.waiting == 0:
            self._unpin(flight)

    def _unpin(self, flight: Flight) -> None:
        if flight.waiting == 0 and flight.entry is not None:
            entry, flight.entry = flight.entry, None
            self._end_lease(entry)

    # --- ending ------------------------------------------------------------------------------

    def _lease(self, entry: Entry) -> Lease:
        return Lease(entry, self._end_lease)

    def _end_lease(self, entry: Entry) -> None:
        entry.leases -= 1
        if entry.leases == 0 and not entry.wiped:
            entry.idle_from = trio.current_time()
            if not entry.current:
                self._wipe(entry, "last close")
            if self._wipe_at(entry) < self._next_sweep:
                self._wake_sweeper()

    def _wipe_at(self, entry: Entry) -> float:
        if entry.leases:
            return math.inf
        return min(
            entry.ready_at + self._settings.lifetime_s + self._settings.stale_s,
            entry.idle_from + self._settings.idle_s,
        )

    def _sweep(self, now: float) -> float:
        """Wipe what is due; returns when the next one is."""
        for entry in [e for e in self._entries if self._wipe_at(e) <= now]:
            self._wipe(entry, "expired")
        self._next_sweep = min(map(self._wipe_at, self._entries), default=math.inf)
        return self._next_sweep

    def _wake_sweeper(self) -> None:
        self._sweep_again.set()
        self._sweep_again = trio.Event()

    def _evict(self, size_bytes: int) -> None:
        """Make room for a plaintext: least recently used first, never one that is open."""
        unused = sorted((e for e in self._entries if not e.leases), key=lambda e: e.idle_from)
        if not self._arena.has_room(size_bytes, without=[entry.slot for entry in unused]):
            return
        for entry in unused:
            if self._arena.has_room(size_bytes):
                return
            self._wipe(entry, "evicted")

    def _retire(self, entry: Entry, reason: str) -> None:
        """No new leases on this entry; wiped now, or at its last close."""
        entry.current = False
        if self._current.get(entry.path) is entry:
            del self._current[entry.path]
        if entry.leases == 0:
            self._wipe(entry, reason)

    def _wipe(self, entry: Entry, reason: str) -> None:
        entry.slot.wipe()
        entry.wiped = True
        entry.current = False
        self._entries.discard(entry)
        if self._current.get(entry.path) is entry:
            del self._current[entry.path]
        self._events.emit(Wiped(path=entry.path, size_bytes=entry.slot.size_bytes, reason=reason))
