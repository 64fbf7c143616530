"""The launcher: mounts, starts and replaces daemon and zygote, unmounts. Never any plaintext.

Single-threaded, without an event loop: it waits for one of a handful of descriptors. It is the
only process of a mount that execs, and gives what it execs a clean environment and exactly the
descriptors meant for it.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from kmsfs import libc
from kmsfs.admin import control
from kmsfs.config import MountConfig
from kmsfs.decryptor import wire
from kmsfs.errors import KmsfsError, MountFailed, from_code
from kmsfs.memory import process
from kmsfs.views import mountpoint as mounts

log = logging.getLogger(__name__)

_READY_S: Final = 15.0
_END_S: Final = 8.0

# A daemon that dies so often within a minute will not live the next time either.
_MAX_RESTARTS: Final = 5
_RESTART_WINDOW_S: Final = 60.0

# Between zygotes: one that dies at once must not become a busy loop.
_ZYGOTE_PAUSE_S: Final = 0.5

# Left above the plaintexts for the reply buffer and what is on its way.
_MEMLOCK_MARGIN_BYTES: Final = 4 << 20

_PLAIN_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the AWS libraries look at besides AWS_*: home directory, proxies, certificates.
_ZYGOTE_VARIABLES: Final = frozenset(
    {"HOME", "PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
)


@dataclass(slots=True)
class _Child:
    pid: int
    pidfd: int

    def kill(self, number: signal.Signals) -> None:
        """Signal the process, if it still is."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_s: float) -> int | None:
        """Exit code (negative: signal), None if it does not end in time."""
        if not _readable(self.pidfd, timeout_s):
            return None
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)


class Launcher:
    """Runs one mount from beginning to end.

    Args:
        log_target: where the daemon's log goes, `stderr` or `syslog`.
    """

    def __init__(self, config: MountConfig, *, log_target: str) -> None:
        self._config = config
        self._log_target = log_target
        self._daemon: _Child | None = None
        self._zygote: _Child | None = None
        self._lifeline: socket.socket | None = None
        self._mount: mounts.Mount | None = None
        self._control_path: str | None = None
        self._stopping = False
        self._detached = False
        self._restarts: list[float] = []
        self._zygote_started_at = -_ZYGOTE_PAUSE_S
        self._signals, signal_writer = socket.socketpair()
        signal_writer.setblocking(False)  # noqa: FBT003
        self._signal_writer = signal_writer

    def start(self) -> None:
        """Mount, start both processes, and return when the first request has been answered.

        Raises:
            KmsfsError: why it cannot be; nothing is left mounted or running.
        """
        self._catch_signals()
        libc.set_process_name("kmsfs-launcher")
        mounts.prepare(self._config.mountpoint)
        process.raise_memlock_limit(self._config.cache.max_bytes + _MEMLOCK_MARGIN_BYTES)
        try:
            self._start_all()
            self._await_ready()
        except BaseException:
            self._end_all()
            raise

    def run(self) -> int:
        """Watch over the mount until it is gone; returns the exit status."""
        with contextlib.closing(os.fdopen(mounts.watch_mount_table())) as table:
            while True:
                poll = select.poll()
                poll.register(self._signals, select.POLLIN)
                poll.register(table, select.POLLPRI)
                if self._lifeline is not None:
                    poll.register(self._lifeline, select.POLLIN)
                if self._daemon is not None:
                    poll.register(self._daemon.pidfd, select.POLLIN)
                if self._zygote is not None:
                    poll.register(self._zygote.pidfd, select.POLLIN)
                ready = {fd for fd, _ in poll.poll()}
                if self._signals.fileno() in ready:
                    self._on_signal(self._signals.recv(16))
                if self._zygote is not None and self._zygote.pidfd in ready:
                    self._zygote.wait(0)
                    self._zygote = None
                if self._lifeline is not None and self._lifeline.fileno() in ready:
                    self._on_message()
                if table.fileno() in ready:
                    self._on_mount_table()
                if self._daemon is not None and self._daemon.pidfd in ready:
                    status = self._on_daemon_end()
                    if status is not None:
                        return status

    # --- starting --------------------------------------------------------------------------------

    def _start_all(self) -> None:
        config = self._config
        fuse_fd = mounts.mount_fuse(
            config.source, config.mountpoint, allow_other=config.allow_other
        )
        # Kept open here, readers would hang instead of getting ENOTCONN when the daemon dies.
        with _closing(fuse_fd):
            self._mount = mounts.find_mount(config.mountpoint)
            if self._mount is None or self._mount.fs_type != mounts.FS_TYPE:
                raise MountFailed(f"{config.mountpoint} is not in the mount table")
            self._detached = False
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._lifeline = ours
            with theirs, self._listen() as listener, _memory_file(config) as config_fd:
                self._daemon = _spawn(
                    "kmsfs.daemon",
                    [fuse_fd, theirs.fileno(), listener.fileno(), config_fd],
                    [self._log_target],
                    {"PATH": _PLAIN_PATH, "LANG": "C.UTF-8"},
                    quiet=self._log_target != "stderr",
                )
        self._start_zygote()

    def _start_zygote(self) -> None:
        """A new zygote, and its socket to the daemon."""
        pause_s = self._zygote_started_at + _ZYGOTE_PAUSE_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        self._zygote_started_at = time.monotonic()
        zygote_end, daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with zygote_end, daemon_end, _memory_file(self._config.kms) as settings_fd:
            self._zygote = _spawn(
                "kmsfs.decryptor.zygote",
                [zygote_end.fileno(), settings_fd],
                [],
                _zygote_environment(),
                quiet=self._log_target != "stderr",
            )
            if self._lifeline is not None:
                with contextlib.suppress(wire.WireError):
                    wire.send(self._lifeline, wire.NewZygote(), [daemon_end.fileno()])

    def _await_ready(self) -> None:
        """Wait for the daemon's word, then for its answer to a request of the kernel.

        Raises:
            KmsfsError: what the daemon said, or that it said nothing.
        """
        assert self._lifeline is not None
        self._lifeline.settimeout(_READY_S)
        try:
            message, _ = wire.receive(self._lifeline)
        except wire.WireError as error:
            raise MountFailed(
                f"the daemon did not come up: {error}", hint="see the log, or use --foreground"
            ) from None
        finally:
            if self._lifeline is not None:
                self._lifeline.settimeout(None)
        if isinstance(message, wire.DaemonFailed):
            raise from_code(message.code, message.detail, message.hint)
        try:
            os.statvfs(self._config.mountpoint)
        except OSError as error:
            raise MountFailed(f"the mount does not answer: {error.strerror}") from error

    @contextlib.contextmanager
    def _listen(self) -> Iterator[socket.socket]:
        """The listening control socket, named after the mount's device number."""
        assert self._mount is not None
        uid = os.geteuid()
        directory = control.socket_directory(uid)
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = control.socket_path(self._mount.device, uid)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._control_path = path
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen()
            yield listener

    # --- watching --------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def _on_signal(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers and not {signal.SIGTERM, signal.SIGINT} & set(numbers):
            # Nothing is read at start that could be read anew.
            return
        if self._stopping or self._daemon is None:
            return
        self._stopping = True
        self._unmount()
        self._daemon.kill(signal.SIGTERM)
        if not _readable(self._daemon.pidfd, _END_S):
            log.error("the daemon did not end on SIGTERM: killed")
            self._daemon.kill(signal.SIGKILL)

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
            if self._zygote is not None:
                self._zygote.kill(signal.SIGKILL)
                self._zygote.wait(_END_S)
            self._start_zygote()

    def _on_mount_table(self) -> None:
        if self._mount is None or self._detached or self._stopping:
            return
        if any(mounts.mounts_of(self._mount.device)):
            return
        self._detached = True
        if self._lifeline is not None:
            with contextlib.suppress(wire.WireError):
                wire.send(self._lifeline, wire.Detached())

    def _on_daemon_end(self) -> int | None:
        """The exit status if this is the end of the mount; None if it goes on."""
        assert self._daemon is not None
        status = self._daemon.wait(0)
        self._daemon = None
        self._end_zygote()
        self._close_channels()
        gone = self._mount is None or not any(mounts.mounts_of(self._mount.device))
        if self._stopping or gone or status == 0:
            self._unmount()
            return 0
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < _RESTART_WINDOW_S] + [now]
        if len(self._restarts) > _MAX_RESTARTS:
            log.error("the daemon died %d times within a minute: giving up", _MAX_RESTARTS)
            self._unmount()
            return 1
        log.error("the daemon ended with status %s: mounting anew", status)
        self._unmount()
        try:
            self._start_all()
            self._await_ready()
        except KmsfsError as error:
            log.error("cannot mount anew: %s", error.detail)  # noqa: TRY400 - said in full
            self._end_all()
            return int(error.exit_code)
        return None

    # --- ending ----------------------------------------------------------------------------------

    def _unmount(self) -> None:
        """Unmount our own mount; lazily where somebody uses it."""
        current = mounts.find_mount(self._config.mountpoint)
        if self._mount is None or current is None or current.mount_id != self._mount.mount_id:
            return
        try:
            mounts.unmount(self._config.mountpoint)
        except OSError as error:
            if error.errno != errno.EBUSY:
                log.warning("unmounting %s: %s", self._config.mountpoint, error.strerror)
            with contextlib.suppress(OSError):
                mounts.unmount(self._config.mountpoint, lazy=True)

    def _end_all(self) -> None:
        self._stopping = True
        self._unmount()
        if self._daemon is not None:
            self._daemon.kill(signal.SIGTERM)
            if self._daemon.wait(_END_S) is None:
                self._daemon.kill(signal.SIGKILL)
                self._daemon.wait(_END_S)
            self._daemon = None
        self._end_zygote()
        self._close_channels()

    def _end_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.kill(signal.SIGKILL)
            self._zygote.wait(_END_S)
            self._zygote = None

    def _close_channels(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        if self._control_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._control_path)
            self._control_path = None


def launch(config: MountConfig, *, foreground: bool, ready: Callable[[], None]) -> int:
    """Mount and serve.

    In the background this returns, in the calling process, once the mount is ready; in the
    foreground it returns when the mount is gone.

    Args:
        ready: called in the foreground when the mount is ready.

    Returns: the exit status.
    Raises:
        KmsfsError: why it cannot be mounted.
    """
    if foreground:
        launcher = Launcher(config, log_target="stderr")
        launcher.start()
        ready()
        return launcher.run()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _be_background_launcher(config, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read()
    if not said:
        raise MountFailed("the launcher ended without a word", hint="use --foreground to see why")
    message = msgspec.json.decode(said, type=wire.DaemonReady | wire.DaemonFailed)
    if isinstance(message, wire.DaemonFailed):
        os.waitpid(pid, 0)
        raise from_code(message.code, message.detail, message.hint)
    return 0


def _be_background_launcher(config: MountConfig, pipe_fd: int) -> None:
    status = 70
    try:
        # Mounted before setsid(): an automount waits for processes of its own session only.
        launcher = Launcher(config, log_target="syslog")
        try:
            launcher.start()
        except KmsfsError as error:
            failed = wire.DaemonFailed(code=error.code, detail=error.detail, hint=error.hint)
            os.write(pipe_fd, msgspec.json.encode(failed))
            status = int(error.exit_code)
            return
        os.setsid()
        os.chdir("/")
        null_fd = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null_fd, fd)
        os.write(pipe_fd, msgspec.json.encode(wire.DaemonReady()))
        os.close(pipe_fd)
        status = launcher.run()
    finally:
        os._exit(status)


def _spawn(
    module: str,
    fds: list[int],
    arguments: list[str],
    environment: dict[str, str],
    *,
    quiet: bool,
) -> _Child:
    """Exec a module of ours with these descriptors, whose new numbers lead its arguments.

    -s and -P: neither the user's site-packages nor the current directory may supply code.
    """
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with _closing(null_fd):
        # Above every source, so that no copy overwrites one that is still to be made.
        first = max(*fds, null_fd, 2) + 1
        targets = range(first, first + len(fds))
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in zip(fds, targets, strict=True)]
        _keep_to_ourselves()
        actions += [(os.POSIX_SPAWN_DUP2, null_fd, fd) for fd in ((0, 1, 2) if quiet else (0,))]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-s", "-P", "-m", module, *map(str, targets), *arguments],
            environment,
            file_actions=actions,
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
        )
    return _Child(pid, os.pidfd_open(pid))


def _keep_to_ourselves() -> None:
    """Let no descriptor that we inherited from whoever started us reach what we exec."""
    for name in os.listdir("/proc/self/fd"):
        # One of them was the listing's own.
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def _zygote_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in _ZYGOTE_VARIABLES
    }
    return {"PATH": _PLAIN_PATH, **kept, **process.SCRUBBING_ENVIRONMENT}


@contextlib.contextmanager
def _memory_file(record: msgspec.Struct) -> Iterator[int]:
    """A descriptor from which a child reads a record as JSON."""
    fd = os.memfd_create("kmsfs-config", os.MFD_CLOEXEC)
    with _closing(fd):
        os.write(fd, msgspec.json.encode(record))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
