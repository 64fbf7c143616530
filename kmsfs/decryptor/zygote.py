"""The zygote: imports boto3 once, then forks workers on request. Never sees plaintext.

Single-threaded by contract: fork is safe here, and the workers' parent-death signal follows the
thread that forked them. Credentials given as environment variables live in its environment; all
others are resolved in the workers.

Run as `python -m kmsfs.decryptor.zygote SOCKET_FD SETTINGS_FD`.
"""

import contextlib
import gc
import os
import signal
import socket
import sys

import msgspec

from kmsfs.decryptor import wire, worker
from kmsfs.keys import aws, loggers
from kmsfs.memory import process
from kmsfs.settings import KmsSettings


class Zygote:
    """Forks a worker for each request on the control socket, until that closes."""

    def __init__(self, control: socket.socket, settings: KmsSettings) -> None:
        self._control = control
        self._settings = settings

    def run(self) -> None:
        """Serve until the daemon closes its end."""
        while True:
            try:
                request, fd = wire.expect(wire.receive(self._control), wire.SpawnWorker)
            except wire.WireError:
                return
            if fd is None:
                return
            try:
                self._spawn(request.id, socket.socket(fileno=fd))
            except wire.WireError:
                return

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
                    worker.main(sock, self._settings, zygote_pid)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            wire.send(self._control, wire.SpawnFailed(id=request_id, detail=error.strerror or ""))
            return
        finally:
            _reap_unwatched()
        try:
            wire.send(self._control, wire.WorkerSpawned(id=request_id, pid=pid), [pidfd])
        finally:
            os.close(pidfd)


def _reap_unwatched() -> None:
    """Have the kernel reap children: workers are watched through pidfds, nobody waits here."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(argv: list[str]) -> None:
    """Be the zygote; returns when the daemon has closed its end."""
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
    with socket.socket(fileno=socket_fd) as control:
        ready = wire.ZygoteReady(
            pid=os.getpid(),
            credential_source=aws.credential_source(settings),
            report=process.report(memory_locked=False),
        )
        try:
            wire.send(control, ready)
        except wire.WireError:
            return
        Zygote(control, settings).run()


if __name__ == "__main__":
    main(sys.argv[1:])
