"""All parts of one mount, put together: the composition root."""

import contextlib
import logging
import os
import signal
import socket
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from kmsfs.admin import control, control_server, eventlog, observe
from kmsfs.admin.audit import Audit
from kmsfs.admin.metrics import Metrics
from kmsfs.admin.status import named_problems
from kmsfs.daemon import answers
from kmsfs.daemon.hooks import Forget, HookWatch
from kmsfs.daemon.lock_mark import LockMark
from kmsfs.decryptor import channel, wire
from kmsfs.decryptor.client import MAX_CALLS, MAX_CALLS_PER_KEY, DecryptorClient
from kmsfs.errors import GuaranteeNotMet, KmsfsError
from kmsfs.events import ConfinementWeak, Event, EventSink, LockChanged
from kmsfs.memory import process
from kmsfs.memory.arena import Arena
from kmsfs.memory.sandbox import SandboxReport
from kmsfs.settings import MountConfig
from kmsfs.store.cache import MAX_WAITING
from kmsfs.store.opener import RemoteOpener
from kmsfs.store.source import Source
from kmsfs.store.volume import Volume
from kmsfs.views.prefetch import Prefetch
from kmsfs.views.ram import RamView
from kmsfs.views.serving import HeldFile, View

# Of an error's text; it may quote a header of up to 64 KiB.
_MAX_DETAIL: Final = 1000

# Everything is wiped before this bounds what is left: telling the kernel to drop its pages.
_END_S: Final = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Handed:
    """What the launcher hands over before the daemon begins.

    Attributes:
        lock_mark: whether a daemon before this one was locked.
        opener: for a daemon that runs as an unprivileged user.
        audit: to the launcher, for a mount whose configuration has one.
        mount_fd: /dev/fuse, or the root of the ramfs.
        mounting_uid: who may command the mount, besides root.
    """

    config: MountConfig
    listener: socket.socket
    lock_mark: LockMark
    opener: RemoteOpener | None
    audit: socket.socket | None
    mount_fd: int
    mounting_uid: int


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
        sandbox: what confines this process.

    Raises:
        GuaranteeNotMet: too few descriptors to serve anything.
        KmsfsError: the source cannot be opened, or no memory can be locked.
    """

    def __init__(self, handed: Handed, launcher: socket.socket, sandbox: SandboxReport) -> None:
        config = handed.config
        if process.descriptor_limit() < process.MIN_DAEMON_DESCRIPTORS:
            raise GuaranteeNotMet(
                f"the limit of descriptors is {process.descriptor_limit()}, and cannot be raised "
                f"to {process.MIN_DAEMON_DESCRIPTORS}",
                hint="raise it (LimitNOFILE, ulimit -n)",
            )
        self._config = config
        self._sandbox = sandbox
        self._launcher_raw = launcher
        self._launcher = trio.socket.from_stdlib_socket(launcher)
        self._listener = handed.listener
        self._mounting_uid = handed.mounting_uid
        self._events = _Fanout()
        self._zygote_wanted = trio.Event()
        # The first comes unasked. A second request for one that is on its way would replace it.
        self._zygote_is_coming = True
        arena = Arena(config.cache.max_bytes, may_be_unlocked=config.cache.allow_unlocked)
        # With one key there are no others to leave room for.
        several_keys = config.kms.any_key or len(config.kms.key_ids) > 1
        self._client = DecryptorClient(
            arena,
            self._events,
            request_zygote=self._want_zygote,
            calls_per_key=MAX_CALLS_PER_KEY if several_keys else MAX_CALLS,
        )
        self._volume = Volume(
            _held_briefly(config) if config.view == "ramfs" else config,
            Source(config.source, handed.opener),
            arena,
            self._client,
            self._events,
        )
        if self._volume.cache.max_decryptions < MAX_WAITING:
            log.warning(
                "%d descriptors are allowed: at most %d files can be decrypted at once",
                process.descriptor_limit(),
                self._volume.cache.max_decryptions,
            )
        self._lock_mark = handed.lock_mark
        self._volume.cache.locked = self._lock_mark.is_set
        self._events.sinks = [eventlog.LogSink()]
        self._audit: Audit | None = None
        if config.audit is not None and handed.audit is not None:
            self._audit = Audit(config.audit, handed.audit)
            self._events.sinks.append(self._audit)
        if sandbox.gaps:
            self._events.emit(ConfinementWeak("the daemon", sandbox.gaps))
        self._view, forget = self._make_view(handed.mount_fd)
        self._hooks = HookWatch(config, self._volume, self._view, forget=forget, say=self._say)
        self._metrics = Metrics()
        self._events.sinks += [self._hooks, self._metrics]

    def _make_view(self, mount_fd: int) -> tuple[View, Forget | None]:
        if self._config.view == "ramfs":
            return RamView(self._config, self._volume, self._events, mount_fd), None
        # Imported where it is used: a machine without FUSE need not have its library.
        from kmsfs.views.fuse import FuseView

        view = FuseView(
            self._volume,
            self._events,
            mount_fd,
            open_deadline_s=self._config.kms.deadline_s,
            prefetch=Prefetch(self._config, self._volume),
            audit=self._audit,
            allow_unlocked=self._config.cache.allow_unlocked,
        )
        self._events.sinks.append(view)
        return view, view.forget_what_changed

    async def run(self) -> None:
        """Serve until the mount, the launcher or our welcome is gone.

        Raises:
            KmsfsError: it cannot be served.
        """
        allowed = frozenset({0, self._mounting_uid})
        failure: KmsfsError | None = None
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._client.workers.run)
                await nursery.start(self._volume.cache.run)
                nursery.start_soon(control_server.serve, self._listener, allowed, self._respond)
                nursery.start_soon(self._ask_for_zygotes)
                nursery.start_soon(self._listen_to_launcher)
                nursery.start_soon(self._obey_signals)
                nursery.start_soon(self._hooks.run)
                if self._audit is not None:
                    nursery.start_soon(self._audit.run)
                try:
                    await self._view.serve(self._say_ready, self._say_progress)
                except KmsfsError as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._volume.cache.wipe_all("end")
            self._view.close()
        if failure is not None:
            raise failure

    async def lock(self, by_uid: int) -> control.Locked:
        """Wipe everything, in the order that leaves no way for plaintext to come back."""
        self._lock_mark.set(locked=True)
        wiped = len(self._volume.cache.held())
        wiped += len(self._view.shown) if isinstance(self._view, RamView) else 0
        held: tuple[HeldFile, ...] = ()
        try:
            await self._volume.lock()
        finally:
            held = await self._view.after_lock()
            await self._client.workers.end_zygote()
            self._events.emit(LockChanged(locked=True, by_uid=by_uid))
        return control.Locked(wiped=wiped, held=answers.held_records(held))

    async def unlock(self, by_uid: int) -> control.Unlocked:
        """Serve again; a zygote is asked for at once, so that the first open finds it."""
        self._volume.unlock()
        self._lock_mark.set(locked=False)
        self._hooks.look()
        self._want_zygote()
        self._events.emit(LockChanged(locked=False, by_uid=by_uid))
        with trio.move_on_after(answers.REFILL_S):
            return control.Unlocked(missing=named_problems(await self._view.after_unlock()))
        return control.Unlocked(filled=False)

    async def _respond(self, request: control.Request, uid: int) -> control.Answer:
        match request:
            case control.StatusRequest():
                ram = answers.ram_status(self._config, self._view)
                status = await observe.gather(
                    self._config, self._volume, self._client, self._sandbox, ram
                )
                status = msgspec.structs.replace(
                    status,
                    hooks=self._hooks.status,
                    audit=None if self._audit is None else self._audit.status,
                    counters=self._metrics.counters,
                )
                return control.StatusAnswer(status=status)
            case control.LockRequest():
                return await self.lock(uid)
            case control.UnlockRequest():
                return await self.unlock(uid)
            case control.RefreshRequest():
                return await answers.refreshed(self._volume, self._view, request)
            case control.WhyRequest(path=path):
                report = await answers.explained(
                    self._config, self._volume, self._client, self._view, path
                )
                return control.WhyAnswer(file=report)

    # --- launcher and zygote -------------------------------------------------------------------

    async def _say_ready(self, missing: dict[str, KmsfsError]) -> None:
        for path, error in missing.items():
            hint = error.hint if error.hint != type(error).hint else None
            await self._say(
                wire.FileMissing(
                    path=path, code=error.code, detail=error.detail[:_MAX_DETAIL], hint=hint
                )
            )
        if missing and self._config.require_all:
            count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
            raise GuaranteeNotMet(
                f"{count} could not be decrypted, and all are required", hint="see above"
            )
        await self._hooks.take_stock()
        await self._say(wire.DaemonReady())

    def _say_progress(self, done: int, total: int) -> None:
        # Also tells the launcher that we live. One that does not listen just now has missed it.
        with contextlib.suppress(OSError, wire.WireError):
            frame = wire.encode(wire.Filling(done=done, total=total))
            self._launcher_raw.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def _say(self, message: wire.Message) -> None:
        # If the launcher is gone, `_listen_to_launcher` sees to it.
        with contextlib.suppress(wire.WireError):
            await channel.send(self._launcher, message)

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
                await self._say(wire.ZygoteWanted())

    async def _listen_to_launcher(self) -> None:
        while True:
            try:
                message, fd = await channel.receive(self._launcher)
            except wire.DescriptorLostError as error:
                # It was a zygote's, which ends; the next open asks for another.
                log.error("from the launcher: %s", error)  # noqa: TRY400 - said in full
                self._zygote_is_coming = False
                continue
            except wire.WireError:
                await self._end_without_launcher()
                return
            if isinstance(message, wire.NewZygote):
                self._zygote_is_coming = False
            match message:
                case wire.NewZygote() if self._volume.cache.locked:
                    log.info("a zygote came while locked: its credentials are not wanted")
                case wire.NewZygote() if fd is not None:
                    self._client.workers.attach_zygote(socket.socket(fileno=fd))
                    fd = None
                case wire.HookReport():
                    self._hooks.note(message)
                case wire.Detached():
                    log.info("unmounted: plaintexts nobody has open are wiped")
                    await self._view.detach()
                case _:
                    log.warning("unexpected %s from the launcher", type(message).__name__)
            if fd is not None:
                os.close(fd)

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
            async for number in signals:
                if number == signal.SIGTERM:
                    await self._end()
                    return
                try:
                    await self.lock(os.getuid())
                except GuaranteeNotMet as error:
                    log.error("locking: %s", error.detail)  # noqa: TRY400 - said in full

    async def _end(self) -> None:
        with trio.move_on_after(_END_S):
            await self._lock_at_the_end()
            held = await self._view.after_lock()
            if held:
                log.warning("ending: programs still hold %d files that were taken away", len(held))
        self._view.stop()

    async def _end_without_launcher(self) -> None:
        if self._config.view != "ramfs":
            log.error("the launcher is gone: ending")
            await self._end()
            return
        log.error("the launcher is gone: ending; the files stay in the ramfs as they are")
        with trio.move_on_after(_END_S):
            await self._lock_at_the_end()
        self._view.stop()

    async def _lock_at_the_end(self) -> None:
        try:
            await self._volume.lock()
        except GuaranteeNotMet as error:
            log.warning("ending: %s", error.detail)


def _held_briefly(config: MountConfig) -> MountConfig:
    """For a view that copies plaintexts: each is wiped as soon as it is copied."""
    cache = msgspec.structs.replace(config.cache, ttl_s=0.0, idle_s=0.0, stale_s=0.0)
    return msgspec.structs.replace(config, cache=cache)
