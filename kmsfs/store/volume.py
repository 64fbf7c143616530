"""One mounted volume: source, policy, cache and decryptor, as the views see them."""

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar, TypeVarTuple

import msgspec
import trio

from kmsfs.decryptor.client import MAX_CALLS, DecryptorClient, Plaintext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    CiphertextChanging,
    CiphertextInvalid,
    DeadlineExceeded,
    FileTooLarge,
    KmsfsError,
    LockedMemoryExhausted,
    NameConflict,
    SourceMissing,
    VolumeLocked,
)
from kmsfs.events import EventSink
from kmsfs.formats.binding import Place
from kmsfs.formats.detect import Format
from kmsfs.memory.arena import Arena
from kmsfs.settings import MountConfig, path_matches
from kmsfs.store.cache import PlaintextCache
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.lease import Lease
from kmsfs.store.policy import Policy
from kmsfs.store.source import (
    Source,
    SourceFile,
    SourceNode,
    Survey,
)
from kmsfs.store.versions import SeenVersions

# Threads for disk I/O that may hang; each one stuck holds a place until its I/O ends.
_IO_THREADS: Final = 64

# When many files are opened at once, how long those wait in all that fail only because KMS was
# away a moment ago: for one pause of the breaker and one probe.
_PATIENCE_S: Final = 2.0
_SHORTEST_WAIT_S: Final = 0.05

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file version somebody has open, its size exact by now; `lease` is to be closed."""

    file: SourceFile
    lease: Lease
    from_cache: bool


@dataclass(slots=True)
class _UnderWay:
    """Of files that are opened together: how many are, and how often one gave its memory back.

    Attributes:
        ended: set at the next end of one, well or not.
    """

    count: int = 0
    gave_back: int = 0
    ended: trio.Event = field(default_factory=trio.Event)

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Around one that is under way."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            self.ended.set()
            self.ended = trio.Event()


class Volume:
    """Looks up, opens and locks; every view serves from one of these.

    Args:
        config: of the mount.
        source: its ciphertext.
        arena: where plaintext goes.
        client: who decrypts; running its workers is the caller's matter.
    """

    def __init__(
        self,
        config: MountConfig,
        source: Source,
        arena: Arena,
        client: DecryptorClient,
        events: EventSink,
    ) -> None:
        self._config = config
        self._client = client
        self._io_threads = trio.CapacityLimiter(_IO_THREADS)
        # Source path of a bare blob to the key that decrypted it, which is tried first next time.
        self._keys_found: dict[str, str] = {}
        prefix = os.path.relpath(config.source, config.volume_root)
        self._prefix: Final = "" if prefix == "." else prefix + "/"
        self.source: Final = source
        self.arena: Final = arena
        self.policy: Final = Policy(config.ownership, config.rules, prefix=self._prefix)
        self.versions: Final = SeenVersions(allow_older=config.rollback == "allow")
        self.cache: Final = PlaintextCache(arena, config.cache, events, self._decrypt)
        self.history: Final = self.cache.history

    # --- metadata: never KMS -------------------------------------------------------------------

    async def look_up(self, directory: str, name: str) -> SourceNode | None:
        """What is served as `name` in a directory; None if nothing is."""
        return await self._disk(self.source.lookup, directory, name)

    async def node_at(self, path: str) -> SourceNode | None:
        """What is served at `path`; the root is the empty string."""
        if not path:
            return await self._disk(self.source.directory, "")
        directory, _, name = path.rpartition("/")
        return await self.look_up(directory, name)

    async def list_directory(self, path: str) -> list[SourceNode]:
        """Everything served in a directory; in a thread, since directories can be large.

        Raises:
            SourceMissing, SourceUnreadable.
        """
        return await trio.to_thread.run_sync(
            self.source.list_directory, path, abandon_on_cancel=True, limiter=self._io_threads
        )

    async def check_readable(self, path: str) -> None:
        """Make sure that there is something at a path that may be read.

        Raises:
            VolumeLocked, SourceMissing.
        """
        if self.cache.locked:
            raise VolumeLocked("the volume is locked")
        if await self.node_at(path) is None:
            raise SourceMissing(f"{path} is not served", hint="see `kmsfs status`")

    async def survey(self) -> Survey:
        """Walk the whole source, in a thread."""
        return await trio.to_thread.run_sync(
            self.source.survey, abandon_on_cancel=True, limiter=self._io_threads
        )

    def path_in_volume(self, path: str) -> str:
        """A served path, made relative to the volume's root, which is what patterns speak of."""
        return self._prefix + path

    def may_be_unbound(self, file: SourceFile) -> bool:
        """Whether a file that is not bound to its place is served all the same."""
        if not self._config.binding_required:
            return True
        path = self.path_in_volume(file.path)
        return any(path_matches(pattern, path) for pattern in self._config.unbound)

    # --- content ---------------------------------------------------------------------------------

    async def open_file(self, path: str, deadline: float) -> OpenedFile:
        """Open the newest version of a file, decrypting it if need be.

        A ciphertext that changes meanwhile is looked up and tried once more.

        Args:
            deadline: on trio's clock, for everything.

        Raises:
            SourceMissing, NameConflict, VolumeLocked, CiphertextChanging, DeadlineExceeded, and
            whatever the decryption raises.
        Cancellation: leaves the decryption running for others.
        Plaintext: in the cache's slot, reachable through the lease.
        """
        try:
            opened = await self._open_or_retry(path, deadline)
        except KmsfsError as error:
            self.history.note_open(path, error=error)
            raise
        self.history.note_open(path, from_cache=opened.from_cache)
        return opened

    async def open_each(
        self,
        paths: Iterable[str],
        *,
        take: Callable[[OpenedFile], Awaitable[None]],
        ended: Callable[[str, KmsfsError | None], None],
    ) -> None:
        """Open many files, as many at a time as KMS may be asked at once.

        A file that KMS was not asked for, having been away before, is tried again for a moment;
        one that found no memory, as often as others of these files give theirs back.

        Args:
            take: gets each file while its lease lives; a KmsfsError of it counts for that file.
            ended: told of each path, with what went wrong or None.

        Cancellation: leaves files that are being decrypted to others.
        """
        turns = trio.Semaphore(MAX_CALLS)
        others = _UnderWay()
        patient_until: float | None = None

        async def try_one(path: str) -> KmsfsError | None:
            try:
                deadline = trio.current_time() + self._config.kms.deadline_s
                opened = await self.open_file(path, deadline)
                try:
                    await take(opened)
                finally:
                    opened.lease.close()
                    others.gave_back += 1
            except KmsfsError as caught:
                return caught
            return None

        async def try_while_memory_comes_back(path: str) -> KmsfsError | None:
            while True:
                known = others.gave_back
                with others.one_more():
                    error = await try_one(path)
                if not isinstance(error, LockedMemoryExhausted):
                    return error
                while others.gave_back == known:
                    if others.count == 0:
                        return error
                    await others.ended.wait()

        async def open_one(path: str) -> None:
            nonlocal patient_until
            async with turns:
                error = await try_while_memory_comes_back(path)
                while error is not None and error.again_in_s is not None:
                    if patient_until is None:
                        patient_until = trio.current_time() + _PATIENCE_S
                    if trio.current_time() >= patient_until:
                        break
                    await trio.sleep(max(_SHORTEST_WAIT_S, error.again_in_s))
                    error = await try_while_memory_comes_back(path)
                ended(path, error)

        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(open_one, path)

    async def lock(self) -> None:
        """No new leases; workers killed and reaped; every slot wiped. Again is harmless.

        Raises:
            GuaranteeNotMet: a killed worker has not ended yet.
        """
        await self.cache.lock(self._client.workers.end_all)

    def unlock(self) -> None:
        """Serve again; descriptors opened before the lock stay dead."""
        self._client.breakers.close_all()
        self.cache.unlock()

    async def _open_or_retry(self, path: str, deadline: float) -> OpenedFile:
        try:
            return await self._open_newest(path, deadline)
        except CiphertextChanging:
            return await self._open_newest(path, deadline)

    async def _open_newest(self, path: str, deadline: float) -> OpenedFile:
        if self.cache.locked:
            raise VolumeLocked("the volume is locked")
        # Around this alone: at the deadline the cache may still have something to serve.
        with trio.CancelScope(deadline=deadline) as looking:
            node = await self.node_at(path)
        if looking.cancelled_caught:
            raise DeadlineExceeded("the open's deadline passed")
        if not isinstance(node, SourceFile):
            raise SourceMissing(f"{path} is not served any more")
        if node.rivals:
            rivals = ", ".join((node.source_path, *node.rivals))
            raise NameConflict(f"{path} is claimed by {rivals}")
        lease, from_cache = await self.cache.acquire(node, deadline)
        exact = replace(node, size_bytes=lease.size_bytes, size_exact=True)
        return OpenedFile(exact, lease, from_cache)

    async def _decrypt(self, file: SourceFile, deadline: float) -> Plaintext:
        limit = self._config.cache.max_file_bytes
        if file.size_exact and file.size_bytes > limit:
            raise FileTooLarge(f"{file.size_bytes} bytes, {limit} at most")
        highest = self.versions.highest_of(file.path)
        fd, version = await self._open_ciphertext(file.source_path)
        try:
            if version != file.version:
                raise CiphertextChanging("the file changed before it was read")
            plaintext = await self._client.decrypt(
                fd, self._rules_for(file), version, key=self._key_of(file), deadline=deadline
            )
        finally:
            os.close(fd)
        try:
            self.versions.check(file.path, plaintext.bound_version, begun_at=highest)
        except CiphertextInvalid:
            plaintext.slot.wipe()
            raise
        if file.format is not Format.ESDK:
            self._keys_found[file.source_path] = plaintext.key_arn
        self.source.remember_size(file.source_path, version, plaintext.slot.size_bytes)
        return plaintext

    async def _open_ciphertext(self, source_path: str) -> tuple[int, FileVersion]:
        """See `Source.open_ciphertext`. Cancellation: no descriptor stays open."""
        guard = threading.Lock()
        wanted = True
        opened_fd: int | None = None

        def open_while_wanted() -> tuple[int, FileVersion]:
            nonlocal opened_fd
            fd, version = self.source.open_ciphertext(source_path)
            with guard:
                if wanted:
                    opened_fd = fd
                else:
                    os.close(fd)
            return fd, version

        try:
            return await self._disk(open_while_wanted)
        except trio.Cancelled:
            with guard:
                wanted = False
                if opened_fd is not None:
                    os.close(opened_fd)
            raise

    def _key_of(self, file: SourceFile) -> str:
        """What counts as one key; a bare blob's own once it is known."""
        if file.format is Format.ESDK:
            return file.key
        key_ids = self._config.kms.key_ids
        only = key_ids[0] if len(key_ids) == 1 else file.key
        return self._keys_found.get(file.source_path, only)

    def _rules_for(self, file: SourceFile) -> DecryptRules:
        kms = self._config.kms
        found = self._keys_found.get(file.source_path)
        if found in kms.key_ids and found != kms.key_ids[0]:
            others = (key_id for key_id in kms.key_ids if key_id != found)
            kms = msgspec.structs.replace(kms, key_ids=(found, *others))
        return DecryptRules.of(
            kms,
            Place(self._config.volume, self.path_in_volume(file.path)),
            binding_required=not self.may_be_unbound(file),
            unknown_as_blob=file.suffix_taken,
            max_plaintext_bytes=self._config.cache.max_file_bytes,
            allow_unlocked=self._config.cache.allow_unlocked,
        )

    async def _disk(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Short disk I/O: here where it is sure to end, else in a thread that can be left."""
        if self.source.is_local:
            return call(*args)
        return await trio.to_thread.run_sync(
            call, *args, abandon_on_cancel=True, limiter=self._io_threads
        )
