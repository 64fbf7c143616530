"""The daemon: composition root of one FUSE mount.

Serves readers from /dev/fuse and holds plaintext in locked memory only. No boto3, no AWS
credentials, no network, no exec. Its descriptors come from the launcher; it ends when the mount
is gone, on SIGTERM, or when the launcher is gone, and has wiped everything then.

Run as `python -m kmsfs.daemon LAUNCHER_FD LOG_TARGET`; all else comes over that descriptor.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Final, get_args

import msgspec
import trio

from kmsfs.admin import control, control_server, eventlog, observe
from kmsfs.decryptor import channel, wire
from kmsfs.decryptor.client import MAX_CALLS, MAX_CALLS_PER_KEY, DecryptorClient
from kmsfs.errors import ExitCode, GuaranteeNotMet, KmsfsError
from kmsfs.events import Event, EventSink, LockChanged
from kmsfs.memory import process
from kmsfs.memory.arena import Arena
from kmsfs.settings import MountConfig
from kmsfs.store.source import Source
from kmsfs.store.volume import Volume
from kmsfs.views import fuse_loop
from kmsfs.views.fuse import FuseView

# Everything is wiped before this bounds what is left: telling the kernel to drop its pages.
_END_S: Final = 5.0

log = logging.getLogger(__name__)


class _Fanout:
    """EventSink that hands every event to several, in order."""

    def __init__(self) -> None:
        self.sinks: list[EventSink] = []

    def emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink.emit(event)


class Daemon:
    """All parts of one mount, put together; owns their lifetimes.

    Args:
        launcher: this end of the socket to the launcher.
        listener: the listening control socket.

    Raises:
        KmsfsError: the source cannot be opened, or no memory can be locked.
    """

    def __init__(
        self, config: MountConfig, launcher: socket.socket, listener: socket.socket, fuse_fd: int
    ) -> None:
        self._config = config
        self._launcher = trio.socket.from_stdlib_socket(launcher)
        self._listener = listener
        self._events = _Fanout()
        self._zygote_wanted = trio.Event()
        # The first comes unasked. A second request for one that is on its way would replace it.
        self._zygote_is_coming = True
        arena = Arena(config.cache.max_bytes)
        # With one key there are no others to leave room for.
        several_keys = len(config.kms.key_ids) > 1
        self._client = DecryptorClient(
            arena,
            self._events,
            request_zygote=self._want_zygote,
            calls_per_key=MAX_CALLS_PER_KEY if several_keys else MAX_CALLS,
        )
        self._volume = Volume(config, Source(config.source), arena, self._client, self._events)
        self._view = FuseView(self._volume, self._events, open_deadline_s=config.kms.deadline_s)
        self._events.sinks = [eventlog.LogSink(), self._view]
        fuse_loop.attach(self._view, fuse_fd)

    async def run(self) -> None:
        """Serve until the mount, the launcher or our welcome is gone; everything is wiped then."""
        allowed = frozenset({0, os.getuid()})
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._client.workers.run)
                await nursery.start(self._volume.cache.run)
                nursery.start_soon(self._view.drop_pages_of_wiped_files)
                nursery.start_soon(control_server.serve, self._listener, allowed, self._respond)
                nursery.start_soon(self._ask_for_zygotes)
                nursery.start_soon(self._listen_to_launcher)
                nursery.start_soon(self._end_on_signal)
                await channel.send(self._launcher, wire.DaemonReady())
                await fuse_loop.serve()
                nursery.cancel_scope.cancel()
        finally:
            self._volume.cache.wipe_all("end")
            self._view.wipe_reply_buffer()
            fuse_loop.close()

    async def lock(self, by_uid: int) -> None:
        """Wipe everything, in the order that leaves no way for plaintext to come back."""
        try:
            await self._volume.lock()
        finally:
            await self._view.drop_all_pages()
            self._client.workers.drop_zygote()
            self._events.emit(LockChanged(locked=True, by_uid=by_uid))

    def unlock(self, by_uid: int) -> None:
        """Serve again; a zygote is asked for at once, so that the first open finds it."""
        self._volume.unlock()
        self._want_zygote()
        self._events.emit(LockChanged(locked=False, by_uid=by_uid))

    async def _respond(self, request: control.Request, uid: int) -> control.Answer:
        match request:
            case control.StatusRequest():
                status = await observe.gather(self._config, self._volume, self._client)
                return control.StatusAnswer(status=status)
            case control.LockRequest():
                await self.lock(uid)
            case control.UnlockRequest():
                self.unlock(uid)
        return control.Done()

    def _want_zygote(self) -> None:
        self._zygote_wanted.set()

    async def _ask_for_zygotes(self) -> None:
        while True:
            await self._zygote_wanted.wait()
            self._zygote_wanted = trio.Event()
            if self._zygote_is_coming or self._client.workers.has_zygote:
                continue
            if not self._volume.cache.locked:
                self._zygote_is_coming = True
                # If the launcher is gone, `_listen_to_launcher` sees to it.
                with contextlib.suppress(wire.WireError):
                    await channel.send(self._launcher, wire.ZygoteWanted())

    async def _listen_to_launcher(self) -> None:
        while True:
            try:
                message, fd = await channel.receive(self._launcher)
            except wire.WireError:
                log.error("the launcher is gone: ending")  # noqa: TRY400 - no traceback to show
                await self._end()
                return
            if isinstance(message, wire.NewZygote):
                self._zygote_is_coming = False
            match message:
                case wire.NewZygote() if self._volume.cache.locked:
                    log.info("a zygote came while locked: its credentials are not wanted")
                case wire.NewZygote() if fd is not None:
                    self._client.workers.attach_zygote(socket.socket(fileno=fd))
                    fd = None
                case wire.Detached():
                    log.info("unmounted lazily: plaintexts nobody has open are wiped")
                    self._volume.cache.detach()
                case _:
                    log.warning("unexpected %s from the launcher", type(message).__name__)
            if fd is not None:
                os.close(fd)

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                await self._end()
                return

    async def _end(self) -> None:
        with trio.move_on_after(_END_S):
            try:
                await self._volume.lock()
            except GuaranteeNotMet as error:
                log.warning("ending: %s", error.detail)
            await self._view.drop_all_pages()
        fuse_loop.stop()


@dataclass(slots=True)
class _Handed:
    """What the launcher hands over before the daemon begins."""

    config: MountConfig
    listener: socket.socket
    fuse_fd: int


def main(argv: list[str]) -> int:
    """Be the daemon; returns the exit status."""
    launcher_fd, log_target = int(argv[0]), argv[1]
    process.harden("kmsfs-daemon")
    process.forbid_new_privileges()
    eventlog.set_up("stderr" if log_target == "stderr" else "syslog", name="kmsfs")
    # A terminal's ^C is the launcher's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = socket.socket(fileno=launcher_fd)
    try:
        handed = _receive_handed(launcher)
    except wire.WireError as error:
        # Mostly the launcher found that nothing can be mounted, and says why itself.
        log.debug("nothing to serve: %s", error)
        return int(ExitCode.MOUNTPOINT)
    try:
        trio.run(_run, handed, launcher)
    except KmsfsError as error:
        wire.send(
            launcher, wire.DaemonFailed(code=error.code, detail=error.detail, hint=error.hint)
        )
        return int(error.exit_code)
    return 0


def _receive_handed(launcher: socket.socket) -> _Handed:
    fds: dict[wire.Handed, int] = {}
    while len(fds) < len(get_args(wire.Handed)):
        message, fd = wire.expect(wire.receive(launcher), wire.HandOver)
        if fd is None or message.item in fds:
            raise wire.WireError(f"{message.item} was handed over without a descriptor, or twice")
        fds[message.item] = fd
    with open(fds["config"], "rb") as file:
        config = msgspec.json.decode(file.read(), type=MountConfig)
    return _Handed(config, socket.socket(fileno=fds["control"]), fds["fuse"])


async def _run(handed: _Handed, launcher: socket.socket) -> None:
    await Daemon(handed.config, launcher, handed.listener, handed.fuse_fd).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
