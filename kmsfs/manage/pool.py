"""Worker processes for a command over many files.

What a worker decrypts or encrypts stays in its memory and ends with it; the process of the
command itself holds no plaintext. Workers are forked once the slow imports are done, take one
file at a time, and tell how it went. There are more of them than may ask KMS at once, so that
those that compute and write meanwhile leave no call unused.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NoReturn

from kmsfs.errors import KmsfsError, WorkerFailed
from kmsfs.manage.gate import Gate
from kmsfs.memory import process

CALLS_AT_ONCE: Final = 8
"""To KMS, by all workers of a command together."""

_WORKERS: Final = 12

_MAX_FRAME_BYTES: Final = 128 << 10

State = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went with one file. Texts and paths only, never content.

    Attributes:
        output: what was written, or would be.
        detail: why it was skipped or what failed.
        code, hint: of the error, for `kmsfs.error_codes.from_code`; hint is None for the class's.
        warnings: (warning, hint) pairs.
    """

    state: State
    output: str = ""
    detail: str = ""
    code: str = ""
    hint: str | None = None
    warnings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, error: KmsfsError) -> "Outcome":
        """Of a file that failed."""
        hint = error.hint if error.hint != type(error).hint else None
        return cls("failed", detail=error.detail, code=error.code, hint=hint)


Work = Callable[[int], Outcome]
"""What a worker does with the file of this number."""


@dataclass(frozen=True, slots=True)
class _Worker:
    slot: int
    pid: int
    sock: socket.socket


def run(count: int, start: Callable[[Gate], Work]) -> Generator[tuple[int, Outcome], None, None]:
    """Have `count` files worked on; yields each one's number and outcome as it ends.

    To be closed by whoever iterates: workers are then ended, in the midst of what they do, and
    waited for. A worker that dies fails its file alone. This process must have no other threads.

    Args:
        start: called in each worker first, with the gate that calls to KMS go through.
    """
    if not count:
        return
    # Workers copy fewer pages of objects that the collector does not visit.
    gc.collect()
    gc.freeze()
    pool = _Pool(count, start)
    try:
        yield from pool.outcomes()
    finally:
        pool.close()


class _Pool:
    """The workers of one command, by their slots, and who works on what."""

    def __init__(self, count: int, start: Callable[[Gate], Work]) -> None:
        self._start = start
        self._rest = iter(range(count))
        self._slots = min(_WORKERS, count)
        self._gate = Gate(CALLS_AT_ONCE, self._slots)
        self._workers: dict[int, _Worker] = {}
        self._busy: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """Begin, and go on until all is done."""
        for slot in range(self._slots):
            self._begin(slot)
        while self._workers:
            for key, _ in self._selector.select():
                worker: _Worker = key.data
                frame = _receive(worker.sock)
                number = self._busy.pop(worker.slot)
                if frame:
                    yield number, _outcome_of(json.loads(frame))
                    self._hand_out(worker)
                    continue
                self._end(worker)
                self._gate.restore(worker.slot)
                yield number, Outcome.of(WorkerFailed("the process that worked on it died"))
                self._begin(worker.slot)

    def close(self) -> None:
        """End all workers that there still are."""
        for worker in self._workers.values():
            os.kill(worker.pid, signal.SIGTERM)
            worker.sock.close()
        for worker in self._workers.values():
            os.waitpid(worker.pid, 0)
        self._selector.close()
        self._gate.close()

    def _begin(self, slot: int) -> None:
        worker = _fork(slot, self._start, self._gate, list(self._workers.values()))
        self._workers[slot] = worker
        self._selector.register(worker.sock, selectors.EVENT_READ, worker)
        self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        number = next(self._rest, None)
        if number is None:
            self._end(worker)
            return
        self._busy[worker.slot] = number
        # If it has died, the end of its socket tells.
        with contextlib.suppress(OSError):
            worker.sock.send(str(number).encode())

    def _end(self, worker: _Worker) -> None:
        self._selector.unregister(worker.sock)
        del self._workers[worker.slot]
        worker.sock.close()
        os.waitpid(worker.pid, 0)


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_MAX_FRAME_BYTES)
    except ConnectionResetError:
        return b""


def _outcome_of(fields: dict[str, Any]) -> Outcome:
    warnings = tuple((warning, hint) for warning, hint in fields.pop("warnings"))
    return Outcome(**fields, warnings=warnings)


def _fork(
    slot: int, start: Callable[[Gate], Work], gate: Gate, siblings: Sequence[_Worker]
) -> _Worker:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        for sibling in siblings:
            sibling.sock.close()
        gate.use_slot(slot)
        _work(its, parent_pid, start, gate)
    its.close()
    return _Worker(slot, pid, ours)


def _work(
    sock: socket.socket, parent_pid: int, start: Callable[[Gate], Work], gate: Gate
) -> NoReturn:
    """Be a worker until the other end closes; never returns."""
    status = 70
    try:
        # A terminal's ^C is for the command, which ends its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.end_with_parent(parent_pid)
        process.harden("kmsfs-worker")
        process.lock_all_memory()
        work = start(gate)
        while number := _receive(sock):
            outcome = _attempt(work, int(number))
            sock.send(json.dumps(asdict(outcome)).encode())
        status = 0
    except (SystemExit, BrokenPipeError):
        # SIGTERM, after unwinding; or nobody waits for the answer.
        status = 1
    finally:
        # Nothing of what the parent had begun to write is flushed a second time.
        os._exit(status)


def _attempt(work: Work, number: int) -> Outcome:
    try:
        return work(number)
    except KmsfsError as error:
        return Outcome.of(error)
    except Exception as error:  # noqa: BLE001 - told where somebody reads it
        # The class and the place alone: an exception's text may hold content.
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if f"{os.sep}kmsfs{os.sep}" in frame.filename][-1]
        at = f"{type(error).__name__} at {os.path.basename(place.filename)}:{place.lineno}"
        return Outcome("failed", detail=at, code="WorkerBug")
