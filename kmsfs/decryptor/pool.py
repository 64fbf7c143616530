"""The daemon's workers: asked of the zygote, kept for the next request, killed, awaited.

A worker is ended with SIGKILL, always: it has nothing to save, and the kernel's freeing of its
memory is what erases botocore's copies of plaintext.
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
from kmsfs.errors import GuaranteeNotMet
from kmsfs.events import EventSink, WorkerEnded

# A worker is kept this long for the next request, and for at most so many: every one of them
# leaves copies of plaintext in its heap.
IDLE_WORKER_S: Final = 5.0
MAX_REQUESTS_PER_WORKER: Final = 256

# A fork takes milliseconds; a zygote that has not answered by then is replaced.
_SPAWN_S: Final = 3.0

# How long to wait for the kernel to finish a killed process.
_REAP_S: Final = 5.0


class WorkerLostError(Exception):
    """The worker died, hung or answered garbage; or there was no new one to be had."""


@dataclass(eq=False, slots=True)
class PooledWorker:
    """A worker process, the descriptor it is killed by, and our end of its socket."""

    pid: int
    pidfd: int
    sock: trio.socket.SocketType
    served: int = 0
    idle_since: float = 0.0
    killed: bool = False


@dataclass(eq=False, slots=True)
class _Zygote:
    sock: trio.socket.SocketType
    raw_sock: socket.socket
    ready: trio.Event = field(default_factory=trio.Event)
    greeting: wire.ZygoteReady | None = None


class WorkerPool:
    """Gets, keeps and ends workers.

    `run` must be running in a nursery; `attach_zygote` supplies the parent of the workers.

    Args:
        request_zygote: asks the launcher for a zygote; called when one is needed and none is
            there. Must not block.
    """

    def __init__(self, events: EventSink, request_zygote: Callable[[], None]) -> None:
        self._events = events
        self._request_zygote = request_zygote
        self._nursery: trio.Nursery | None = None
        self._zygote: _Zygote | None = None
        self._zygote_attached = trio.Event()
        self._spawning = trio.Lock()
        self._workers: set[PooledWorker] = set()
        self._idle: list[PooledWorker] = []
        self._worker_ended = trio.Event()
        self._next_id = 0

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
            for worker in self._workers:
                self.kill(worker)
            self.drop_zygote()

    @property
    def has_zygote(self) -> bool:
        """Whether a zygote is attached, ready or still starting."""
        return self._zygote is not None

    @property
    def greeting(self) -> wire.ZygoteReady | None:
        """What the zygote said of itself; None while there is none or it is still starting."""
        return None if self._zygote is None else self._zygote.greeting

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that may hold plaintext in their heaps now."""
        return tuple(worker.pid for worker in self._workers)

    def attach_zygote(self, sock: socket.socket) -> None:
        """Take over the control socket of a new zygote, in place of an older one."""
        self.drop_zygote()
        assert self._nursery is not None, "run() is not running"
        self._zygote = _Zygote(trio.socket.from_stdlib_socket(sock), sock)
        self._nursery.start_soon(self._greet, self._zygote)
        self._zygote_attached.set()
        self._zygote_attached = trio.Event()

    def drop_zygote(self) -> None:
        """Close the zygote's socket: it exits, and the credentials in it are gone."""
        if self._zygote is not None:
            self._zygote.sock.close()
            self._zygote.ready.set()
            self._zygote = None

    async def end_zygote(self) -> None:
        """Have the zygote end, and wait until it has: no memory holds its credentials then.

        The end of file on its socket says so, which it leaves to the kernel to close.

        Raises:
            GuaranteeNotMet: it has not ended; it will as soon as it can.
        Cancellation: it ends all the same.
        """
        if self._zygote is None:
            return
        # Others may be waiting on the socket, and are woken by its closing.
        with trio.socket.fromfd(
            self._zygote.sock.fileno(), socket.AF_UNIX, socket.SOCK_SEQPACKET
        ) as leaving:
            with contextlib.suppress(OSError):
                leaving.shutdown(socket.SHUT_WR)
            self.drop_zygote()
            with trio.move_on_after(_REAP_S) as waiting:
                await _until_closed(leaving)
        if waiting.cancelled_caught:
            raise GuaranteeNotMet(
                f"{_REAP_S:.0f} s after it was told to, the process that holds credentials had "
                "not ended",
                hint="lock again, or unmount",
            )

    async def end_all(self) -> None:
        """Kill every worker and wait until the kernel has ended it.

        Requests under way fail; whoever made them must have been cancelled before.

        Raises:
            GuaranteeNotMet: a killed process has not ended, as when a disk holds it up; it will
                end as soon as it can.
        """
        for worker in list(self._workers):
            self.kill(worker)
        with trio.move_on_after(_REAP_S, shield=True):
            while self._workers:
                await self._worker_ended.wait()
        if self._workers:
            pids = ", ".join(map(str, self.pids))
            raise GuaranteeNotMet(
                f"{_REAP_S:.0f} s after they were killed these processes had not ended: {pids}",
                hint="the kernel frees their memory when they end; see what disk they wait for",
            )

    async def get(self) -> PooledWorker:
        """A worker for one request, to be given to `keep` or `kill`.

        Waits for a zygote for as long as the caller's deadline allows.

        Raises:
            WorkerLostError: no process to be had.
        """
        return self._idle_worker() or await self._spawn()

    def keep(self, worker: PooledWorker) -> None:
        """Take a worker back that answered in form; it serves the next request."""
        if worker.killed:
            return
        worker.served += 1
        if worker.served >= MAX_REQUESTS_PER_WORKER:
            self.kill(worker)
            return
        worker.idle_since = trio.current_time()
        self._idle.append(worker)

    def kill(self, worker: PooledWorker) -> None:
        """End a worker, without waiting for its end; again is harmless."""
        if worker.killed:
            return
        worker.killed = True
        with contextlib.suppress(ValueError):
            self._idle.remove(worker)
        try:
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:
            # It runs as another user. Without a zygote it has ended with that.
            if self._zygote is not None:
                with contextlib.suppress(wire.WireError):
                    wire.send(self._zygote.raw_sock, wire.KillWorker(pid=worker.pid))
        worker.sock.close()
        if self._nursery is not None:
            self._nursery.start_soon(self._bury, worker)

    # --- processes ---------------------------------------------------------------------------

    def _idle_worker(self) -> PooledWorker | None:
        while self._idle:
            worker = self._idle.pop()
            # An idle worker has nothing to say: readable means that it is gone.
            probe = select.poll()
            probe.register(worker.sock, select.POLLIN)
            if not probe.poll(0):
                return worker
            self.kill(worker)
        return None

    def _end_idle_workers(self, idle_before: float) -> None:
        for worker in [w for w in self._idle if w.idle_since <= idle_before]:
            self.kill(worker)

    async def _bury(self, worker: PooledWorker) -> None:
        """Wait until the process has ended (its pidfd turns readable), then forget it."""
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(worker.pidfd)
        os.close(worker.pidfd)
        self._workers.discard(worker)
        self._worker_ended.set()
        self._worker_ended = trio.Event()

    async def _spawn(self) -> PooledWorker:
        """A new worker; waits for a zygote for as long as the caller's deadline allows."""
        async with self._spawning:
            while True:
                zygote = await self._ready_zygote()
                try:
                    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                except OSError as error:
                    raise WorkerLostError(f"no new process: {error.strerror}") from None
                try:
                    with theirs, trio.move_on_after(_SPAWN_S):
                        return await self._spawn_from(zygote, ours, theirs)
                    raise wire.WireError("no answer to SpawnWorker")
                except wire.DescriptorLostError as error:
                    # The worker sees the end of its socket.
                    ours.close()
                    raise WorkerLostError(f"no new process: {error}") from None
                except (wire.WireError, OSError):
                    ours.close()
                    if self._zygote is zygote:
                        self.drop_zygote()
                except BaseException:
                    ours.close()
                    raise

    async def _spawn_from(
        self, zygote: _Zygote, ours: socket.socket, theirs: socket.socket
    ) -> PooledWorker:
        self._next_id += 1
        wanted_id = self._next_id
        await channel.send(zygote.sock, wire.SpawnWorker(id=wanted_id), [theirs.fileno()])
        while True:
            received = await channel.receive(zygote.sock)
            if isinstance(received[0], wire.SpawnFailed):
                if received[0].id != wanted_id:
                    continue
                raise WorkerLostError(f"no new process: {received[0].detail}")
            answer, fd = wire.expect(received, wire.WorkerSpawned)
            pidfd = _checked_pidfd(fd)
            if answer.id == wanted_id:
                worker = PooledWorker(answer.pid, pidfd, trio.socket.from_stdlib_socket(ours))
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


async def _until_closed(sock: trio.socket.SocketType) -> None:
    """Wait for a peer's end, whatever it has still to say."""
    with contextlib.suppress(OSError):
        while await sock.recv(wire.MAX_FRAME_BYTES):
            pass


def _checked_pidfd(fd: int | None) -> int:
    """A descriptor that a worker can be killed and awaited by.

    Raises:
        WireError: it is none; it is closed.
    """
    if fd is None:
        raise wire.WireError("no pidfd")
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(fd, 0)
    except OSError as error:
        os.close(fd)
        raise wire.WireError(f"not a pidfd: {error.strerror}") from None
    return fd
