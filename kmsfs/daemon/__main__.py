"""The daemon's process: what it is handed, and what it gives up before it begins.

Serves readers from /dev/fuse, or fills a ramfs, and holds plaintext in locked memory only. No
boto3, no AWS credentials; before it serves, the kernel is told to refuse it network, exec and
writing to files (but for the ramfs). Its descriptors come from the launcher; it ends when the
mount is gone, on SIGTERM, or when the launcher is gone. It has wiped everything then, except what
lies in a ramfs whose launcher was killed: programs still need that.

Run as `python -m kmsfs.daemon LAUNCHER_FD LOG_TARGET`; all else comes over that descriptor.
"""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys

import msgspec
import trio

from kmsfs.admin import eventlog
from kmsfs.daemon.composition import Daemon, Handed
from kmsfs.daemon.lock_mark import LockMark
from kmsfs.decryptor import wire
from kmsfs.errors import ExitCode, KmsfsError
from kmsfs.memory import process, sandbox
from kmsfs.memory.sandbox import SandboxReport
from kmsfs.settings import MountConfig
from kmsfs.store.opener import RemoteOpener
from kmsfs.views import ram_tree

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Be the daemon; returns the exit status."""
    launcher_fd, log_target = int(argv[0]), argv[1]
    process.harden("kmsfs-daemon")
    process.forbid_new_privileges()
    ram_tree.ignore_lease_breaks()
    eventlog.set_up("stderr" if log_target == "stderr" else "syslog", name="kmsfs")
    # A terminal's ^C is the launcher's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = socket.socket(fileno=launcher_fd)
    if os.path.exists("/dev/fuse"):
        # While the launcher finds out what is to be mounted.
        with contextlib.suppress(ImportError):
            importlib.import_module("kmsfs.views.fuse")
    try:
        handed = _receive_handed(launcher)
    except wire.WireError as error:
        # Mostly the launcher found that nothing can be mounted, and says why itself.
        log.debug("nothing to serve: %s", error)
        return int(ExitCode.MOUNTPOINT)
    if handed.config.debug:
        eventlog.show_debug()
    if handed.config.run_as is not None:
        process.become(handed.config.run_as.uid, handed.config.run_as.gid)
    # Before the first thread, which trio starts when it has something to do in one.
    walls = sandbox.confine_daemon(handed.mount_fd if handed.config.view == "ramfs" else None)
    try:
        trio.run(_run, handed, launcher, walls)
    except KmsfsError as error:
        wire.send(
            launcher, wire.DaemonFailed(code=error.code, detail=error.detail, hint=error.hint)
        )
        return int(error.exit_code)
    return 0


def _receive_handed(launcher: socket.socket) -> Handed:
    fds: dict[wire.Handed, int] = {}
    while "mount" not in fds:
        message, fd = wire.expect(wire.receive(launcher), wire.HandOver)
        if fd is None or message.item in fds:
            raise wire.WireError(f"{message.item} was handed over without a descriptor, or twice")
        fds[message.item] = fd
    with open(fds["config"], "rb") as file:
        config = msgspec.json.decode(file.read(), type=MountConfig)
    opener = RemoteOpener(socket.socket(fileno=fds["opener"])) if "opener" in fds else None
    return Handed(
        config,
        listener=socket.socket(fileno=fds["control"]),
        lock_mark=LockMark(fds["lock"]),
        opener=opener,
        audit=socket.socket(fileno=fds["audit"]) if "audit" in fds else None,
        mount_fd=fds["mount"],
        mounting_uid=os.getuid(),
    )


async def _run(handed: Handed, launcher: socket.socket, walls: SandboxReport) -> None:
    await Daemon(handed, launcher, walls).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
