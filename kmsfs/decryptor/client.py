"""The daemon's end: sends ciphertext to workers, matches answers, times out, replaces the dead.

A worker serves one request at a time. It is ended with SIGKILL, always: it has nothing to save,
and the kernel's freeing of its memory is what erases botocore's copies of plaintext.
"""

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from kmsfs.decryptor import channel, wire
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import DeadlineExceeded, WorkerFailed, from_code
from kmsfs.events import EventSink, WorkerEnded
from kmsfs.memory.arena import Arena, Slot
from kmsfs.memory.process import ProcessReport

# Calls to KMS at once: a fleet shares its account's quota, and a machine has few secrets.
MAX_CALLS: Final = 8
# Of these, at most so many for one key where a volume has several, so that a slow key leaves
# room for the others.
MAX_CALLS_PER_KEY: Final = 4

# A worker is kept this long for the next request, and for at most so many: every one of them
# leaves copies of plaintext in its heap.
IDLE_WORKER_S: Final = 5.0
MAX_REQUESTS_PER_WORKER: Final = 64

# A worker that has not answered after this part of the time left is taken for hung, which
# leaves the rest for one more try.
_FIRST_ATTEMPT_SHARE: Final = 0.6

# How long to wait for the kernel to finish a killed process.
_REAP_S: Final = 5.0

FileVersion = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Plaintext:
    """A decrypted file in its slot, which the receiver must wipe in the end."""

    slot: Slot
    key_arn: str
    format: str


@dataclass(eq=False, slots=True)
class _Worker:
    pid: int
    pidfd: int
    sock: trio.socket.SocketType
    served: int = 0
    idle_since: float = 0.0
    killed: bool = False


@dataclass(eq=False, slots=True)
class _Zygote:
    sock: trio.socket.SocketType
    ready: trio.Event = field(default_factory=trio.Event)
    greeting: wire.ZygoteReady | None = None


class _WorkerLostError(Exception):
    """The worker died, hung or answered garbage."""


class DecryptorClient:
    """Decrypts files through worker processes.

    `run` must be running in a nursery; `attach_zygote` supplies the parent of the workers.

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
        self._arena = arena
        self._events = events
        self._request_zygote = request_zygote
        self._calls = trio.Semaphore(MAX_CALLS)
        self._calls_per_key = calls_per_key
        self._key_calls: dict[str, trio.Semaphore] = {}
        self._nursery: trio.Nursery | None = None
        self._zygote: _Zygote | None = None
        self._zygote_attached = trio.Event()
        self._spawning = trio.Lock()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._worker_ended = trio.Event()
        self._next_id = 0
        self.worker_report: ProcessReport | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch over workers until cancelled; every worker is killed then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(IDLE_WORKER_S / 4)
                    self._end_idle_workers(trio.current_time() - IDLE_WORKER_S)
        finally:
            self._nursery = None
            self.drop_zygote()
            for worker in self._workers:
                self._kill(worker)

    @property
    def has_zygote(self) -> bool:
        """Whether a zygote is attached, ready or still starting."""
        return self._zygote is not None

    @property
    def zygote_greeting(self) -> wire.ZygoteReady | None:
        """What the zygote said of itself; None while there is none or it is still starting."""
        return None if self._zygote is None else self._zygote.greeting

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Processes that may hold plaintext in their heaps now."""
        return tuple(worker.pid for worker in self._workers)

    def attach_zygote(self, sock: socket.socket) -> None:
        """Take over the control socket of a new zygote, in place of an older one."""
        self.drop_zygote()
        assert self._nursery is not None, "run() is not running"
        self._zygote = _Zygote(trio.socket.from_stdlib_socket(sock))
        self._nursery.start_soon(self._greet, self._zygote)
        self._zygote_attached.set()
        self._zygote_attached = trio.Event()

    def drop_zygote(self) -> None:
        """Close the zygote's socket: it exits, and the credentials in it are gone."""
        if self._zygote is not None:
            self._zygote.sock.close()
            self._zygote.ready.set()
            self._zygote = None

    async def end_workers(self) -> None:
        """Kill every worker and wait until the kernel has ended it.

        Requests under way fail; whoever made them must have been cancelled before.
        """
        for worker in list(self._workers):
            self._kill(worker)
        with trio.move_on_after(_REAP_S, shield=True):
            while self._workers:
                await self._worker_ended.wait()

    async def decrypt(
        self, fd: int, rules: DecryptRules, version: FileVersion, *, key: str, deadline: float
    ) -> Plaintext:
        """Decrypt one file into a slot.

        Args:
            fd: the ciphertext; stays the caller's.
            version: of `fd`, as the caller saw it; a file that differs is CiphertextChanging.
            key: what counts as one key for the limit of calls.
            deadline: on trio's clock; waiting for a turn counts.

        Raises:
            DeadlineExceeded: no answer in time.
            WorkerFailed: two workers died or answered nonsense.
            KmsfsError: what the worker reported.
        Cancellation: the request is abandoned, its worker killed, its memory freed.
        Plaintext: only in the slot.
        """
        with trio.CancelScope(deadline=deadline) as scope:
            async with self._key_semaphore(key), self._calls:
                return await self._decrypt_with_retry(fd, rules, version, deadline)
        assert scope.cancelled_caught
        raise DeadlineExceeded("no answer from KMS within the deadline")

    async def _decrypt_with_retry(
        self, fd: int, rules: DecryptRules, version: FileVersion, deadline: float
    ) -> Plaintext:
        last_attempt = False
        while True:
            now = trio.current_time()
            share = 1.0 if last_attempt else _FIRST_ATTEMPT_SHARE
            budget_s = max(0.0, (deadline - now) * share)
            try:
                with trio.move_on_after(budget_s):
                    return await self._attempt(fd, rules, version, budget_s)
                if last_attempt:
                    raise DeadlineExceeded("no answer from KMS within the deadline")
            except _WorkerLostError as error:
                if last_attempt:
                    raise WorkerFailed(f"two workers were lost; the second: {error}") from None
            last_attempt = True

    async def _attempt(
        self, fd: int, rules: DecryptRules, version: FileVersion, budget_s: float
    ) -> Plaintext:
        worker = self._idle_worker() or await self._spawn()
        self._next_id += 1
        request = wire.Decrypt(id=self._next_id, rules=rules, version=version, deadline_s=budget_s)
        intact = False
        try:
            await channel.send(worker.sock, request, [fd])
            reply, received_fd = await channel.receive(worker.sock)
            if isinstance(reply, wire.Failed) and reply.id == request.id:
                intact = True
                raise from_code(reply.code, reply.detail, reply.hint)
            plaintext = self._take(reply, received_fd, request.id)
            try:
                await channel.send(worker.sock, wire.Taken(id=request.id))
            except BaseException:
                plaintext.slot.wipe()
                raise
            intact = True
            return plaintext
        except (wire.WireError, OSError) as error:
            self._events.emit(WorkerEnded(pid=worker.pid, reason=str(error)))
            raise _WorkerLostError(str(error)) from None
        finally:
            if intact:
                self._keep(worker)
            else:
                self._kill(worker)

    def _take(self, reply: wire.Message, fd: int | None, request_id: int) -> Plaintext:
        if (
            not isinstance(reply, wire.Decrypted)
            or reply.id != request_id
            or (fd is None) != (reply.size_bytes == 0)
        ):
            if fd is not None:
                os.close(fd)
            raise wire.WireError(f"a {type(reply).__name__} that answers no request")
        self.worker_report = reply.report
        try:
            slot = self._arena.adopt(fd, reply.size_bytes)
        except WorkerFailed as error:
            raise wire.WireError(error.detail) from None
        return Plaintext(slot=slot, key_arn=reply.key_arn, format=reply.format)

    # --- workers ---------------------------------------------------------------------------

    def _idle_worker(self) -> _Worker | None:
        while self._idle:
            worker = self._idle.pop()
            # An idle worker has nothing to say: readable means that it is gone.
            probe = select.poll()
            probe.register(worker.sock, select.POLLIN)
            if not probe.poll(0):
                return worker
            self._kill(worker)
        return None

    def _keep(self, worker: _Worker) -> None:
        worker.served += 1
        if worker.served >= MAX_REQUESTS_PER_WORKER:
            self._kill(worker)
            return
        worker.idle_since = trio.current_time()
        self._idle.append(worker)

    def _end_idle_workers(self, idle_before: float) -> None:
        for worker in [w for w in self._idle if w.idle_since <= idle_before]:
            self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        if worker.killed:
            return
        worker.killed = True
        with contextlib.suppress(ValueError):
            self._idle.remove(worker)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        worker.sock.close()
        if self._nursery is not None:
            self._nursery.start_soon(self._bury, worker)

    async def _bury(self, worker: _Worker) -> None:
        """Wait until the process has ended (its pidfd turns readable), then forget it."""
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(worker.pidfd)
        os.close(worker.pidfd)
        self._workers.discard(worker)
        self._worker_ended.set()
        self._worker_ended = trio.Event()

    async def _spawn(self) -> _Worker:
        """A new worker; waits for a zygote for as long as the caller's deadline allows."""
        async with self._spawning:
            while True:
                zygote = await self._ready_zygote()
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    with theirs:
                        return await self._spawn_from(zygote, ours, theirs)
                except (wire.WireError, OSError):
                    ours.close()
                    if self._zygote is zygote:
                        self.drop_zygote()
                except BaseException:
                    ours.close()
                    raise

    async def _spawn_from(
        self, zygote: _Zygote, ours: socket.socket, theirs: socket.socket
    ) -> _Worker:
        self._next_id += 1
        wanted_id = self._next_id
        await channel.send(zygote.sock, wire.SpawnWorker(id=wanted_id), [theirs.fileno()])
        while True:
            answer, pidfd = await channel.receive(zygote.sock)
            if isinstance(answer, wire.SpawnFailed) and answer.id == wanted_id:
                raise _WorkerLostError(f"no new process: {answer.detail}")
            if not isinstance(answer, wire.WorkerSpawned) or pidfd is None:
                raise wire.WireError(f"a {type(answer).__name__} in answer to SpawnWorker")
            if answer.id == wanted_id:
                worker = _Worker(answer.pid, pidfd, trio.socket.from_stdlib_socket(ours))
                self._workers.add(worker)
                return worker
            # The answer to a request whose asker was cancelled: its worker sees end of file.
            os.close(pidfd)

    async def _ready_zygote(self) -> _Zygote:
        while True:
            if self._zygote is None:
                attached = self._zygote_attached
                self._request_zygote()
                await attached.wait()
                continue
            zygote = self._zygote
            await zygote.ready.wait()
            if zygote is self._zygote:
                return zygote

    async def _greet(self, zygote: _Zygote) -> None:
        try:
            greeting, _ = wire.expect(await channel.receive(zygote.sock), wire.ZygoteReady)
            zygote.greeting = greeting
        except (wire.WireError, OSError) as error:
            self._events.emit(WorkerEnded(pid=0, reason=f"zygote: {error}"))
            if self._zygote is zygote:
                self.drop_zygote()
        finally:
            zygote.ready.set()

    def _key_semaphore(self, key: str) -> trio.Semaphore:
        return self._key_calls.setdefault(key, trio.Semaphore(self._calls_per_key))
