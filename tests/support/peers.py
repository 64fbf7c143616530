"""Zygotes and workers as real processes, and the daemon's side of their sockets."""

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from kmsfs.decryptor import wire
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.decryptor.worker import version_of
from kmsfs.memory.process import SCRUBBING_ENVIRONMENT
from kmsfs.settings import KmsSettings
from tests.support.secret_memory import content_of_memory


class WorkerPeer:
    """The daemon's side of one worker, new from a zygote."""

    def __init__(self, control: socket.socket) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            wire.send(control, wire.SpawnWorker(id=1), [theirs.fileno()])
        spawned, pidfd = wire.expect(wire.receive(control), wire.WorkerSpawned)
        assert pidfd is not None
        self.pid: int = spawned.pid
        self.pidfd = pidfd
        self.ids = iter(range(1, 1000))

    def request(
        self, path: Path, rules: DecryptRules, *, deadline_s: float = 20.0, stale: bool = False
    ) -> wire.Decrypt:
        """Ask for a file."""
        fd = os.open(path, os.O_RDONLY)
        version = (1, 2, 3, 4, 5) if stale else version_of(fd)
        message = wire.Decrypt(
            id=next(self.ids), rules=rules, version=version, deadline_s=deadline_s
        )
        wire.send(self.sock, message, [fd])
        os.close(fd)
        return message

    def answer(self) -> tuple[wire.Message, int | None]:
        """What the worker says."""
        return wire.receive(self.sock)

    def plaintext(self) -> tuple[wire.Decrypted, bytes]:
        """The answer to a request that must succeed, and what it handed over."""
        decrypted, fd = wire.expect(self.answer(), wire.Decrypted)
        content = b"" if fd is None else content_of_memory(fd, decrypted.size_bytes)
        wire.send(self.sock, wire.Taken(id=decrypted.id))
        return decrypted, content

    def failure(self, path: Path, rules: DecryptRules, **how: float) -> tuple[str, str]:
        """Code and detail of a request that must fail."""
        request = self.request(path, rules, **how)  # type: ignore[arg-type] # **float
        failed, _ = wire.expect(self.answer(), wire.Failed)
        assert failed.id == request.id
        return failed.code, failed.detail

    def ended(self) -> bool:
        """Whether the worker ends within a few seconds."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(10_000))


class Peer(WorkerPeer):
    """The daemon's side of a zygote, and of its first worker."""

    def __init__(self, zygote: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self.zygote, self.control = zygote, control
        greeting, _ = wire.expect(wire.receive(control), wire.ZygoteReady)
        self.greeting: wire.ZygoteReady = greeting
        super().__init__(control)
        self.others: list[WorkerPeer] = []

    def another(self) -> WorkerPeer:
        """One more worker of the same zygote."""
        self.others.append(WorkerPeer(self.control))
        return self.others[-1]


@contextlib.contextmanager
def running_peer(
    env: Mapping[str, str],
    endpoint_url: str,
    *,
    module: str = "kmsfs.decryptor.zygote",
    more: Sequence[str] = (),
    **settings: str,
) -> Iterator[Peer]:
    """A zygote as the launcher starts it; it and its workers must end by themselves.

    Args:
        module: what to run in place of the zygote, with `more` arguments.
    """
    kms = KmsSettings(endpoint_url=endpoint_url, **settings)  # type: ignore[arg-type]
    settings_r, settings_w = os.pipe()
    os.write(settings_w, msgspec.json.encode(kms))
    os.close(settings_w)
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        zygote = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), str(settings_r), *more],
            pass_fds=[theirs.fileno(), settings_r],
            env={**env, **SCRUBBING_ENVIRONMENT},
        )
    os.close(settings_r)
    peer = Peer(zygote, control)
    try:
        yield peer
    finally:
        workers = [peer, *peer.others]
        for worker in workers:
            worker.sock.close()
        control.close()
        assert zygote.wait(10) == 0
        for worker in workers:
            assert worker.ended()
            os.close(worker.pidfd)
