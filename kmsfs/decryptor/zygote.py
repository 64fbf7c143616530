"""The zygote: imports boto3 once, then forks workers on request. Never sees plaintext.

Single-threaded by contract: fork is safe here, and the workers' parent-death signal follows the
thread that forked them. Credentials given as environment variables live in its environment; all
others are found by the workers, and rest between them in memory that it holds and never maps.

Run as `python -m kmsfs.decryptor.zygote SOCKET_FD SETTINGS_FD`.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

import msgspec

from kmsfs.decryptor import wire, worker
from kmsfs.decryptor.credential_cache import CredentialCache
from kmsfs.keys import aws, loggers
from kmsfs.memory import process
from kmsfs.settings import KmsSettings


class Zygote:
    """Forks a worker for each request on the control socket, until that closes."""

    def __init__(
        self, control: socket.socket, settings: KmsSettings, cache: CredentialCache | None
    ) -> None:
        self._control = control
        self._settings = settings
        # Of the workers, so that they can be ended without a doubt about whose number it is.
        self._pidfds: dict[int, int] = {}
        self._cache = cache

    def run(self) -> None:
        """Serve until the daemon closes its end."""
        while True:
            try:
                request, fd = wire.receive(self._control)
                match request:
                    case wire.SpawnWorker() if fd is not None:
                        self._spawn(request.id, socket.socket(fileno=fd))
                    case wire.KillWorker():
                        self._kill(request.pid)
                    case _:
                        return
            except wire.WireError:
                return

    def _kill(self, pid: int) -> None:
        """End a worker; only one of ours, and never a process that has its number by now."""
        pidfd = self._pidfds.get(pid)
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _spawn(self, request_id: int, sock: socket.socket) -> None:
        zygote_pid = os.getpid()
        # A worker that ends at once stays a zombie until there is a pidfd of it: its number
        # cannot become another process's meanwhile.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            with sock:
                pid = os.fork()
                if pid == 0:
                    self._control.close()
                    for sibling_pidfd in self._pidfds.values():
                        os.close(sibling_pidfd)
                    worker.main(sock, self._settings, zygote_pid, self._cache)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            wire.send(self._control, wire.SpawnFailed(id=request_id, detail=error.strerror or ""))
            return
        finally:
            _reap_unwatched()
        self._forget_ended()
        self._pidfds[pid] = pidfd
        wire.send(self._control, wire.WorkerSpawned(id=request_id, pid=pid), [pidfd])

    def _forget_ended(self) -> None:
        poll = select.poll()
        for pidfd in self._pidfds.values():
            poll.register(pidfd, select.POLLIN)
        ended = {pidfd for pidfd, _ in poll.poll(0)}
        for pid, pidfd in list(self._pidfds.items()):
            if pidfd in ended:
                os.close(pidfd)
                del self._pidfds[pid]


def _reap_unwatched() -> None:
    """Have the kernel reap children: workers are watched through pidfds, nobody waits here."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(argv: list[str]) -> NoReturn:
    """Be the zygote until the daemon closes its end; never returns.

    Its own end of the socket is closed by the kernel alone, when this process has ended and its
    memory is freed: whoever sees the end of file there knows that.
    """
    status = 70
    try:
        _serve(argv)
        status = 0
    except Exception:  # noqa: BLE001 - told here, as nothing gets past _exit
        traceback.print_exc()
    finally:
        os._exit(status)


def _serve(argv: list[str]) -> None:
    socket_fd, settings_fd = (int(text) for text in argv)
    process.harden("kmsfs-zygote")
    loggers.silence()
    with open(settings_fd, "rb") as file:
        settings = msgspec.json.decode(file.read(), type=KmsSettings)
    _reap_unwatched()
    # The launcher ends this process by closing the daemon's end; a terminal's ^C is not for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    aws.warm_up(settings)
    # Objects made so far stay out of the collector, so that workers do not copy their pages.
    gc.collect()
    gc.freeze()
    source = aws.credential_source(settings)
    cache = None if source == "environment" else CredentialCache.create()
    control = socket.socket(fileno=socket_fd)
    ready = wire.ZygoteReady(
        pid=os.getpid(),
        credential_source=source,
        report=process.report(memory_locked=False),
        keeps_credentials=cache is not None or source == "environment",
    )
    with contextlib.suppress(wire.WireError):
        wire.send(control, ready)
        Zygote(control, settings, cache).run()
    if cache is not None:
        # Before the end of this process is seen.
        cache.close()


if __name__ == "__main__":
    main(sys.argv[1:])
