"""A zygote and workers that follow a script: real processes on the real wire, without AWS.

Run as `python -m tests.support.scripted_zygote SOCKET_FD STEP...`: each SpawnWorker takes the
next step, and the last one for good. A worker's plaintext is its ciphertext reversed.

Steps of the zygote: `zygote-dies`, `zygote-hangs`, `no-fork`, `no-pidfd`, `greet-nonsense` (at
once). Steps of a worker: `serve`, and below.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from typing import NoReturn

import msgspec

from kmsfs.decryptor import wire
from kmsfs.errors import KmsfsError
from kmsfs.memory import process
from kmsfs.memory.mapping import LockedMapping, create_secret_memory, round_to_pages
from kmsfs.memory.sandbox import SandboxReport

REPORT = process.ProcessReport(
    undumpable=True, core_limit_zero=True, memory_locked=True, allocator_scrubs=True
)


def start(sock: socket.socket, steps: list[str]) -> "subprocess.Popen[bytes]":
    """A scripted zygote with its end of the control socket, which is closed here."""
    with sock:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(sock.fileno()), *steps],
            pass_fds=[sock.fileno()],
        )


def read_ciphertext(fd: int) -> bytes:
    """All of a small file."""
    return os.pread(fd, 4 << 20, 0)


def memory_with(content: bytes) -> int:
    """What an honest worker hands over."""
    fd, kind = create_secret_memory(len(content))
    mapping = LockedMapping.of(fd, kind)
    view = mapping.borrow(len(content))
    view[:] = content
    mapping.take_back(view)
    mapping.release()
    return fd


def answer(request: wire.Decrypt, size_bytes: int) -> wire.Decrypted:
    """An answer in form."""
    return wire.Decrypted(
        id=request.id, size_bytes=size_bytes, key_arn="arn:key", format="scripted", report=REPORT
    )


def send_anything(sock: socket.socket, message: wire.Message, fds: list[int]) -> None:
    """A frame, with descriptors where none belong."""
    sock.sendmsg([wire.encode(message)], wire.fds_ancillary(fds))


def work(sock: socket.socket, step: str) -> None:
    """Be a worker that follows one step for every request."""
    while step != "die-at-once":
        try:
            request, fd = wire.expect(wire.receive(sock), wire.Decrypt)
        except wire.WireError:
            return
        assert fd is not None
        plaintext = read_ciphertext(fd)[::-1]
        match step:
            case "serve":
                memory = [memory_with(plaintext)] if plaintext else []
                wire.send(sock, answer(request, len(plaintext)), memory)
                try:
                    wire.expect(wire.receive(sock), wire.Taken)
                except wire.WireError:
                    return
            case "serve-last":
                last = msgspec.structs.replace(answer(request, len(plaintext)), last=True)
                wire.send(sock, last, [memory_with(plaintext)])
                wire.receive(sock)
            case "serve-unconfined":
                open_to_it = SandboxReport(landlock_abi=0, seccomp=False, gaps=("open",))
                report = msgspec.structs.replace(REPORT, sandbox=open_to_it)
                told = msgspec.structs.replace(answer(request, len(plaintext)), report=report)
                wire.send(sock, told, [memory_with(plaintext)])
                wire.receive(sock)
            case "ask-another":
                wire.send(sock, wire.AskAnother(id=request.id))
            case "serve-and-die":
                wire.send(sock, answer(request, len(plaintext)), [memory_with(plaintext)])
                wire.receive(sock)
                return
            case "die":
                return
            case "hang":
                signal.pause()
            case "garbage":
                sock.send(os.urandom(100))
            case "another-message":
                wire.send(sock, wire.Taken(id=request.id))
            case "wrong-id":
                other = wire.Decrypt(
                    id=request.id + 1,
                    rules=request.rules,
                    version=request.version,
                    deadline_s=1,
                )
                wire.send(sock, answer(other, len(plaintext)), [memory_with(plaintext)])
            case "wrong-size":
                claimed = round_to_pages(len(plaintext)) + 1
                wire.send(sock, answer(request, claimed), [memory_with(plaintext)])
            case "no-memory":
                wire.send(sock, answer(request, len(plaintext)))
            case "memory-for-nothing":
                wire.send(sock, answer(request, 0), [memory_with(plaintext)])
            case "unsealed":
                memfd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
                os.ftruncate(memfd, round_to_pages(len(plaintext)))
                wire.send(sock, answer(request, len(plaintext)), [memfd])
            case "write-sealed":
                memfd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
                os.ftruncate(memfd, round_to_pages(len(plaintext)))
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
                fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
                wire.send(sock, answer(request, len(plaintext)), [memfd])
            case "failed-with-descriptor":
                failed = wire.Failed(id=request.id, code="KeyUnusable", detail="disabled")
                send_anything(sock, failed, [0])
            case _:
                code, _, detail = step.partition(":")
                wire.send(sock, wire.Failed(id=request.id, code=code, detail=detail))
        os.close(fd)


def spawn(control: socket.socket, request_id: int, fd: int, step: str) -> None:
    """Fork a worker, and answer for it."""
    with socket.socket(fileno=fd) as sock:
        zygote_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_worker(sock, step, zygote_pid)
    pidfd = os.pidfd_open(pid)
    try:
        wire.send(control, wire.WorkerSpawned(id=request_id, pid=pid), [pidfd])
    finally:
        os.close(pidfd)


def _be_worker(sock: socket.socket, step: str, zygote_pid: int) -> NoReturn:
    try:
        process.end_with_parent(zygote_pid)
        work(sock, step)
    except (KmsfsError, wire.WireError, OSError):
        pass
    finally:
        os._exit(0)


def main(argv: list[str]) -> None:
    """Be the zygote."""
    control, steps = socket.socket(fileno=int(argv[0])), argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if steps[0] == "greet-nonsense":
        control.send(b"hello")
        signal.pause()
    ready = wire.ZygoteReady(
        pid=os.getpid(), credential_source="test", report=REPORT, keeps_credentials=True
    )
    wire.send(control, ready)
    while True:
        try:
            request, fd = wire.expect(wire.receive(control), wire.SpawnWorker)
        except wire.WireError:
            return
        assert fd is not None
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        match step:
            case "zygote-dies":
                return
            case "zygote-hangs":
                signal.pause()
            case "no-fork":
                os.close(fd)
                wire.send(control, wire.SpawnFailed(id=request.id, detail="too many"))
            case "no-pidfd":
                wire.send(control, wire.WorkerSpawned(id=request.id, pid=1), [fd])
                os.close(fd)
            case _:
                try:
                    spawn(control, request.id, fd, step)
                except wire.WireError:
                    return


if __name__ == "__main__":
    main(sys.argv[1:])
