"""The daemon's end: sends ciphertext to workers, matches answers, times out, tries once more."""

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

import trio

from kmsfs.decryptor import channel, wire
from kmsfs.decryptor.breaker import Breakers
from kmsfs.decryptor.pool import WorkerLostError, WorkerPool
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.error_codes import from_code
from kmsfs.errors import CredentialsUnavailable, DeadlineExceeded, WorkerFailed
from kmsfs.events import ConfinementWeak, EventSink, WorkerEnded
from kmsfs.kms_call import KmsCall
from kmsfs.memory.arena import Arena, Slot
from kmsfs.memory.process import ProcessReport

# Calls to KMS at once: a fleet shares its account's quota, and a machine has few secrets.
MAX_CALLS: Final = 8
# Of these, at most so many for one key where a volume has several, so that a slow key leaves
# room for the others.
MAX_CALLS_PER_KEY: Final = 4

# A worker that has not answered after this part of the time left is taken for hung, which
# leaves the rest for one more try.
_FIRST_ATTEMPT_SHARE: Final = 0.6

# A worker is told to be done a little earlier than that, so that what it has to say of a KMS
# that does not answer is heard.
_WORKER_SHARE: Final = 0.95


class _WornWorkerError(Exception):
    """The worker's credentials were refused, and another may find better ones."""


FileVersion = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Plaintext:
    """A decrypted file in its slot, which the receiver must wipe in the end.

    `bound_version` is the authenticated version of a bound file, `call` what KMS was asked.
    """

    slot: Slot
    key_arn: str
    format: str
    bound_version: int | None = None
    call: KmsCall | None = None


class DecryptorClient:
    """Decrypts files through worker processes, `workers`, whose `run` is the caller's to run.

    Args:
        arena: where plaintexts are taken in.
        request_zygote: asks the launcher for a zygote; called when one is needed and none is
            there. Must not block.
        calls_per_key: how many calls may be under way for one key.
    """

    def __init__(
        self,
        arena: Arena,
        events: EventSink,
        *,
        request_zygote: Callable[[], None],
        calls_per_key: int = MAX_CALLS_PER_KEY,
    ) -> None:
        self.workers: Final = WorkerPool(events, request_zygote)
        self.breakers: Final = Breakers(trio.current_time, events)
        self._arena = arena
        self._events = events
        self._calls = trio.Semaphore(MAX_CALLS)
        self._calls_per_key = calls_per_key
        self._key_calls: dict[str, trio.Semaphore] = {}
        self._request_ids = itertools.count(1)
        self.worker_report: ProcessReport | None = None

    async def decrypt(
        self, fd: int, rules: DecryptRules, version: FileVersion, *, key: str, deadline: float
    ) -> Plaintext:
        """Decrypt one file into a slot.

        Args:
            fd: the ciphertext; stays the caller's.
            version: of `fd`, as the caller saw it; a file that differs is CiphertextChanging.
            key: what counts as one key for the limit of calls and for `breakers`.
            deadline: on trio's clock; waiting for a turn counts.

        Raises:
            DeadlineExceeded: no answer in time.
            KmsUnreachable, CredentialsUnavailable: also at once, as `Breakers.attempt` says.
            WorkerFailed: two workers died or answered nonsense.
            KmsfsError: what the worker reported.
        Cancellation: the request is abandoned, its worker killed, its memory freed.
        Plaintext: only in the slot.
        """
        with self.breakers.attempt(key) as attempt:
            async with self._turn(key, deadline):
                ends_at = min(deadline, attempt.begin())
                with trio.CancelScope(deadline=ends_at):
                    return await self._decrypt_with_retry(fd, rules, version, ends_at)
                raise DeadlineExceeded("no answer from KMS within the deadline")

    @contextlib.asynccontextmanager
    async def _turn(self, key: str, deadline: float) -> AsyncIterator[None]:
        """Hold one of the calls that may be under way at once, and of those for one key."""
        held: list[trio.Semaphore] = []
        try:
            with trio.CancelScope(deadline=deadline):
                for semaphore in (self._key_semaphore(key), self._calls):
                    await semaphore.acquire()
                    held.append(semaphore)
            if len(held) < 2:
                raise DeadlineExceeded("other calls to KMS took all the time until the deadline")
            yield
        finally:
            for semaphore in held:
                semaphore.release()

    async def _decrypt_with_retry(
        self, fd: int, rules: DecryptRules, version: FileVersion, deadline: float
    ) -> Plaintext:
        last_attempt = False
        worn_workers = 0
        while True:
            now = trio.current_time()
            share = 1.0 if last_attempt else _FIRST_ATTEMPT_SHARE
            ends_at = now + max(0.0, (deadline - now) * share)
            try:
                with trio.move_on_at(ends_at):
                    return await self._attempt(fd, rules, version, ends_at)
                if last_attempt:
                    raise DeadlineExceeded("no answer from KMS within the deadline")
            except _WornWorkerError:
                # Each one that was kept may say so once; after them come new ones.
                worn_workers += 1
                if worn_workers > MAX_CALLS:
                    raise CredentialsUnavailable("KMS refuses the credentials") from None
                continue
            except WorkerLostError as error:
                if last_attempt:
                    raise WorkerFailed(f"two workers were lost; the second: {error}") from None
            last_attempt = True

    async def _attempt(
        self, fd: int, rules: DecryptRules, version: FileVersion, ends_at: float
    ) -> Plaintext:
        worker = await self.workers.get()
        request = wire.Decrypt(
            id=next(self._request_ids),
            rules=rules,
            version=version,
            deadline_s=max(0.0, ends_at - trio.current_time()) * _WORKER_SHARE,
        )
        intact = False
        try:
            await channel.send(worker.sock, request, [fd])
            reply, received_fd = await channel.receive(worker.sock)
            if isinstance(reply, wire.AskAnother) and reply.id == request.id:
                raise _WornWorkerError
            if isinstance(reply, wire.Failed) and reply.id == request.id:
                intact = not reply.last
                error = from_code(reply.code, reply.detail, reply.hint)
                error.call = reply.call
                raise error
            plaintext, last = self._take(reply, received_fd, request.id)
            try:
                await channel.send(worker.sock, wire.Taken(id=request.id))
            except BaseException:
                plaintext.slot.wipe()
                raise
            intact = not last
            return plaintext
        except (wire.WireError, OSError) as error:
            self._events.emit(WorkerEnded(pid=worker.pid, reason=str(error)))
            raise WorkerLostError(str(error)) from None
        except trio.Cancelled:
            if trio.current_time() >= ends_at:
                self._events.emit(WorkerEnded(pid=worker.pid, reason="no answer in time"))
            raise
        finally:
            if intact:
                self.workers.keep(worker)
            else:
                self.workers.kill(worker)

    def _take(self, reply: wire.Message, fd: int | None, request_id: int) -> tuple[Plaintext, bool]:
        """The plaintext, and whether the worker takes no further request."""
        if (
            not isinstance(reply, wire.Decrypted)
            or reply.id != request_id
            or (fd is None) != (reply.size_bytes == 0)
        ):
            if fd is not None:
                os.close(fd)
            raise wire.WireError(f"a {type(reply).__name__} that answers no request")
        self._note(reply.report)
        try:
            slot = self._arena.adopt(fd, reply.size_bytes)
        except WorkerFailed as error:
            raise wire.WireError(error.detail) from None
        plaintext = Plaintext(
            slot=slot,
            key_arn=reply.key_arn,
            format=reply.format,
            bound_version=reply.bound_version,
            call=reply.call,
        )
        return plaintext, reply.last

    def _note(self, report: ProcessReport) -> None:
        before, self.worker_report = self.worker_report, report
        is_new = before is None or before.sandbox != report.sandbox
        if is_new and report.sandbox is not None and report.sandbox.gaps:
            self._events.emit(ConfinementWeak("workers", report.sandbox.gaps))

    def _key_semaphore(self, key: str) -> trio.Semaphore:
        return self._key_calls.setdefault(key, trio.Semaphore(self._calls_per_key))
