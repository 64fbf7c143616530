"""Runs one mount from beginning to end: starts, watches, replaces, unmounts."""

import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kmsfs.decryptor import wire
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode, KmsfsError, MountFailed
from kmsfs.launcher import children, mount_lock
from kmsfs.launcher.children import Child
from kmsfs.launcher.control_socket import ControlSocket
from kmsfs.launcher.hooks import Hooks
from kmsfs.launcher.restarts import Restarts
from kmsfs.launcher.servant import Servant, servants_of
from kmsfs.launcher.zygote import Zygote
from kmsfs.memory import process
from kmsfs.settings import MountConfig
from kmsfs.views import mountpoint as mounts

if TYPE_CHECKING:
    from kmsfs.launcher.mounting import OpenedMount

log = logging.getLogger(__name__)

_READY_S: Final = 15.0
_END_S: Final = 8.0

# A daemon that has closed its socket has ended within this, or will not.
_DIES_S: Final = 1.0

_END_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})


class Launcher:
    """Runs one mount from beginning to end.

    Args:
        make_config: yields the mount's configuration, or raises why it is impossible; called
            once, while the daemon is already importing its libraries.
        tell: told, before the mount is ready, what the caller might want to know.
        log_target: where the daemon's log goes, `stderr` or `syslog`.
    """

    def __init__(
        self,
        make_config: Callable[[], MountConfig],
        *,
        tell: Callable[[wire.Told], None],
        log_target: str,
    ) -> None:
        self._make_config = make_config
        self._tell = tell
        self._known_config: MountConfig | None = None
        self._log_target = log_target
        self._daemon: Child | None = None
        self._zygote = Zygote(quiet=log_target != "stderr")
        self._hooks = Hooks((), "", self._report_hook)
        self._lifeline: socket.socket | None = None
        self._opened: OpenedMount | None = None
        self._control: ControlSocket | None = None
        self._servants: list[Servant] = []
        self._lock_mark_fd = os.memfd_create("kmsfs-lock", os.MFD_CLOEXEC)
        self._stopping = False
        self._detached = False
        self._restarts = Restarts()
        self._signals, signal_writer = socket.socketpair()
        signal_writer.setblocking(False)  # noqa: FBT003
        self._signal_writer = signal_writer

    def start(self) -> None:
        """Mount, start both processes, and return when the first request has been answered.

        Raises:
            KmsfsError: why it cannot be; nothing is left mounted or running.
        """
        self._catch_signals()
        # Its environment may hold AWS credentials.
        process.harden("kmsfs-launcher")
        try:
            self._start_daemon()
            config = self._known_config = self._make_config()
            self._hooks = Hooks(config.on_change, config.mountpoint, self._report_hook)
            self._mount_and_serve()
            if self._config.strict and self._opened is not None:
                # Imported where it is asked for: all mounts have to start fast.
                from kmsfs.launcher import guarantees

                guarantees.require_all(self._opened.mount, self._tell)
        except BaseException:
            self._end_all()
            raise

    @property
    def fills_once(self) -> bool:
        """Whether no process is to stay behind."""
        return self._config.once

    def run(self) -> int:
        """Watch over the mount until it is gone; returns the exit status."""
        # Whoever waited for the mount to be ready has their answer; what comes later is logged.
        self._tell = lambda _: None
        try:
            return self._watch()
        finally:
            self._hooks.end()

    def _watch(self) -> int:
        with contextlib.closing(os.fdopen(mounts.watch_mount_table())) as table:
            while True:
                poll = self._poll()
                poll.register(table, select.POLLPRI)
                daemon_fd = None if self._daemon is None else self._daemon.pidfd
                for fd in (daemon_fd, self._zygote.pidfd, *self._hooks.fds()):
                    if fd is not None:
                        poll.register(fd, select.POLLIN)
                ready = {fd for fd, _ in poll.poll(self._hooks.pause_ms())}
                self._answer_daemon(ready)
                if self._signals.fileno() in ready:
                    self._on_signal(self._signals.recv(16))
                if self._zygote.pidfd in ready:
                    self._zygote.reap()
                if self._lifeline is not None and self._lifeline.fileno() in ready:
                    self._on_message()
                if table.fileno() in ready:
                    self._on_mount_table()
                if self._daemon is not None and self._daemon.pidfd in ready:
                    status = self._on_daemon_end()
                    if status is not None:
                        return status
                self._hooks.attend()

    # --- starting --------------------------------------------------------------------------------

    @property
    def _config(self) -> MountConfig:
        assert self._known_config is not None, "used before it is known"
        return self._known_config

    def _start_daemon(self) -> None:
        """A new daemon, which waits on the lifeline for what it is to serve."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline = ours
        with theirs:
            self._daemon = children.spawn(
                "kmsfs.daemon",
                [theirs.fileno()],
                [self._log_target],
                children.daemon_environment(),
                quiet=self._log_target != "stderr",
            )

    def _mount_and_serve(self) -> None:
        """Mount, give the daemon what it serves, and wait until it does.

        Raises:
            KmsfsError: why it cannot be.
        """
        with mount_lock.hold(self._config.mountpoint):
            self._mount()
            self._zygote.start(self._config.kms, self._lifeline)
            self._await_ready()

    def _mount(self) -> None:
        assert self._daemon is not None
        assert self._lifeline is not None
        children.raise_limits(self._daemon, self._config.cache.max_bytes)
        # Imported while the daemon starts: nothing may hold that up.
        from kmsfs.launcher.mounting import open_mount

        opened = open_mount(self._config, self._tell)
        # Kept open here, readers would hang instead of getting ENOTCONN when the daemon dies.
        with children.closing(opened.fd):
            self._known_config, self._opened = opened.config, opened
            self._detached = False
            self._control = ControlSocket(opened.mount.device)
            with self._control.listen() as listener:
                self._hand_over("control", listener.fileno())
            with children.memory_file(self._config) as config_fd:
                self._hand_over("config", config_fd)
            self._hand_over("lock", self._lock_mark_fd)
            for servant in servants_of(self._config):
                self._servants.append(servant)
                self._hand_over(servant.item, servant.daemon_end.fileno())
                servant.daemon_end.close()
            self._hand_over("mount", opened.fd)

    def _hand_over(self, item: wire.Handed, fd: int) -> None:
        assert self._lifeline is not None
        try:
            wire.send(self._lifeline, wire.HandOver(item=item), [fd])
        except wire.WireError as error:
            raise MountFailed(f"the daemon is gone: {error}", hint="see the log") from None

    def _await_ready(self) -> None:
        """Wait for the daemon's word, then for its answer to a request of the kernel.

        Raises:
            KmsfsError: what the daemon said, or that it said nothing.
        """
        assert self._lifeline is not None
        try:
            while not isinstance(message := self._next_word(), wire.DaemonReady):
                match message:
                    case wire.DaemonFailed():
                        raise from_code(message.code, message.detail, message.hint)
                    case wire.Filling() | wire.FileMissing():
                        self._tell(message)
                    case wire.ZygoteWanted():
                        self._zygote.start(self._config.kms, self._lifeline)
                    case wire.HooksDue():
                        self._hooks.note(message.changed)
                    case _:
                        log.warning("unexpected %s from the daemon", type(message).__name__)
        except wire.WireError as error:
            raise MountFailed(
                f"the daemon did not come up: {error}", hint="see the log, or use --foreground"
            ) from None
        try:
            os.statvfs(self._config.mountpoint)
        except OSError as error:
            raise MountFailed(f"the mount does not answer: {error.strerror}") from error

    def _poll(self) -> select.poll:
        """Waits for a signal, the daemon's word, or something to do for it."""
        poll = select.poll()
        for watched in (self._signals, self._lifeline, *self._servants):
            if watched is not None:
                poll.register(watched, select.POLLIN)
        return poll

    def _next_word(self) -> wire.Message:
        """What the daemon says next, before it is ready.

        Raises:
            WireError: nothing, for longer than a file may take.
            MountFailed: we are to end.
        """
        assert self._lifeline is not None
        poll = self._poll()
        while ready := poll.poll((_READY_S + self._config.kms.deadline_s) * 1000):
            if (self._signals.fileno(), select.POLLIN) in ready:
                if _END_SIGNALS & set(self._signals.recv(16)):
                    raise MountFailed("interrupted before the mount was ready")
                continue
            ready_fds = {fd for fd, _ in ready}
            self._answer_daemon(ready_fds)
            if self._lifeline.fileno() in ready_fds:
                return wire.receive(self._lifeline)[0]
        raise wire.WireError("it says nothing")

    # --- watching --------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in children.CAUGHT_SIGNALS:
            signal.signal(number, lambda *_: None)

    def _on_signal(self, numbers: bytes) -> None:
        if self._stopping or self._daemon is None:
            return
        if not _END_SIGNALS & set(numbers):
            # On SIGHUP nothing is done: what is read at start could not be read anew.
            if signal.SIGUSR1 in numbers:
                self._daemon.kill(signal.SIGUSR1)
            return
        self._stopping = True
        self._hooks.end()
        self._unmount()
        self._daemon.kill(signal.SIGTERM)
        if not children.readable(self._daemon.pidfd, _END_S):
            log.error("the daemon did not end on SIGTERM: killed")
            self._daemon.kill(signal.SIGKILL)

    def _answer_daemon(self, ready_fds: set[int]) -> None:
        for servant in [one for one in self._servants if one.fileno() in ready_fds]:
            if not servant.answer():
                servant.close()
                self._servants.remove(servant)

    def _on_message(self) -> None:
        assert self._lifeline is not None
        try:
            message, _ = wire.receive(self._lifeline)
        except wire.WireError:
            # The daemon is ending; its pidfd says how.
            self._lifeline.close()
            self._lifeline = None
            return
        if isinstance(message, wire.ZygoteWanted) and not self._stopping:
            self._zygote.start(self._config.kms, self._lifeline)
        if isinstance(message, wire.HooksDue) and not (self._stopping or self._detached):
            self._hooks.note(message.changed)

    def _report_hook(self, report: wire.HookReport) -> None:
        if self._lifeline is not None:
            with contextlib.suppress(wire.WireError):
                wire.send(self._lifeline, report)

    def _is_mounted(self) -> bool:
        return self._opened is not None and any(mounts.mounts_of(self._opened.mount.device))

    def _on_mount_table(self) -> None:
        if self._opened is None or self._detached or self._stopping or self._is_mounted():
            return
        self._detached = True
        self._hooks.end()
        if self._lifeline is not None:
            with contextlib.suppress(wire.WireError):
                wire.send(self._lifeline, wire.Detached())

    def _on_daemon_end(self) -> int | None:
        """The exit status if this is the end of the mount; None if it goes on."""
        assert self._daemon is not None
        status = self._clear_away(self._daemon.wait(0))
        if self._config.once and status == 0:
            return 0
        if self._stopping or not self._is_mounted() or status == 0:
            self._hooks.end()
            self._unmount()
            return 0
        if not self._config.restart:
            log.error("the daemon ended with status %s, and is not to be replaced", status)
            return int(ExitCode.MOUNTPOINT)
        while self._restarts.may_follow():
            log.error("the daemon ended with status %s: starting another", status)
            self._unmount_dead()
            try:
                self._start_daemon()
                self._mount_and_serve()
            except KmsfsError as error:
                status = None if self._daemon is None else self._daemon.wait(_DIES_S)
                if status is not None and status < 0:
                    # Killed before it was ready: that says nothing of the next one.
                    self._clear_away(status)
                    continue
                log.error("cannot mount anew: %s", error.detail)  # noqa: TRY400 - said in full
                self._daemon = self._daemon if status is None else None
                self._end_all()
                return int(error.exit_code)
            self._hooks.report_all()
            self._hooks.note_all()
            return None
        log.error("the daemon died too often within a minute: giving up")
        self._unmount_dead()
        return 1

    # --- ending ----------------------------------------------------------------------------------

    def _unmount_dead(self) -> None:
        """Unmount what nobody serves any more. A ramfs stays: it needs nobody to be read."""
        if self._config.view != "ramfs":
            self._unmount()

    def _unmount(self) -> None:
        """Unmount our own mount; lazily where somebody uses it."""
        if self._opened is not None:
            from kmsfs.launcher.mounting import unmount_ours

            unmount_ours(self._opened)

    def _clear_away(self, status: int | None) -> int | None:
        """Take away what a daemon that has ended leaves behind; returns its status."""
        self._daemon = None
        self._zygote.end()
        self._close_channels()
        return status

    def _end_all(self) -> None:
        self._stopping = True
        if self._opened is not None and self._opened.fresh:
            self._unmount()
        if self._daemon is not None:
            self._daemon.kill(signal.SIGTERM)
            if self._daemon.wait(_END_S) is None:
                self._daemon.kill_now(_END_S)
            self._daemon = None
        self._zygote.end()
        self._close_channels()

    def _close_channels(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        while self._servants:
            self._servants.pop().close()
        if self._control is not None:
            self._control.remove()
            self._control = None
