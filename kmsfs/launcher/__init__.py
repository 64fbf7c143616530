"""The launcher: mounts, starts and replaces daemon and zygote, unmounts. Never any plaintext.

Single-threaded, without an event loop: it waits for one of a handful of descriptors. It is the
only process of a mount that execs, and gives what it execs a clean environment and exactly the
descriptors meant for it.
"""

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import BinaryIO, Final, NoReturn

import msgspec

from kmsfs.admin import eventlog
from kmsfs.decryptor import wire
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode, KmsfsError, MountFailed
from kmsfs.launcher.supervisor import Launcher
from kmsfs.settings import MountConfig

__all__ = ["launch"]

_Said = wire.Told | wire.DaemonReady | wire.DaemonFailed

log = logging.getLogger(__name__)

_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)


def launch(
    make_config: Callable[[], MountConfig], *, foreground: bool, tell: Callable[[wire.Told], None]
) -> int:
    """Mount and serve.

    In the background this returns, in the calling process, once the mount is ready; in the
    foreground it returns when the mount is gone. Interrupted or terminated before, it leaves
    nothing mounted. Must be called from a single-threaded process.

    Args:
        make_config: yields the configuration; called in the launcher.
        tell: told in the calling process, before the mount is ready, how it comes along.

    Returns: the exit status.
    Raises:
        KmsfsError: why it cannot be mounted, also what `make_config` raised.
    """
    _open_standard_streams()
    if foreground:
        eventlog.set_up("stderr", name="kmsfs")
        launcher = Launcher(make_config, tell=tell, log_target="stderr")
        launcher.start()
        return launcher.run()
    read_end, write_end = os.pipe()
    signal.signal(signal.SIGTERM, _end)
    # Held back over the fork: what a handler raises in one of its hooks would be swallowed.
    signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _be_background_launcher(make_config, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
            last = _last_word(pipe, tell)
            # Too late from here on: what is mounted stays so, and the exit status says it.
            for number in _INTERRUPTS:
                signal.signal(number, signal.SIG_IGN)
        except BaseException:
            # Interrupted: nothing may come to be mounted behind the caller's back.
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            raise
    if last is None:
        raise MountFailed("the launcher ended without a word", hint="use --foreground to see why")
    if isinstance(last, wire.DaemonFailed):
        os.waitpid(pid, 0)
        raise from_code(last.code, last.detail, last.hint)
    return ExitCode.DONE


def _last_word(
    pipe: BinaryIO, tell: Callable[[wire.Told], None]
) -> wire.DaemonReady | wire.DaemonFailed | None:
    """Whether it is mounted, or why not; None if the launcher ended without saying."""
    for line in pipe:
        message = msgspec.json.decode(line, type=_Said)
        if isinstance(message, wire.DaemonReady | wire.DaemonFailed):
            return message
        tell(message)
    return None


def _end(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _open_standard_streams() -> None:
    """Started without them, a socket of ours could take one of their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _be_background_launcher(make_config: Callable[[], MountConfig], pipe_fd: int) -> NoReturn:
    status = int(ExitCode.BUG)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        eventlog.set_up("syslog", name="kmsfs")
        # Mounted before setsid(): an automount waits for processes of its own session only.
        launcher = Launcher(make_config, tell=lambda told: _say(pipe_fd, told), log_target="syslog")
        try:
            launcher.start()
            if launcher.fills_once:
                status = launcher.run()
        except KmsfsError as error:
            _say(
                pipe_fd,
                wire.DaemonFailed(code=error.code, detail=error.detail, hint=error.hint),
            )
        except Exception as error:  # noqa: BLE001 - the caller reports a bug like any failure
            _say(pipe_fd, wire.DaemonFailed(code=type(error).__name__, detail="in the launcher"))
        else:
            if launcher.fills_once:
                _say(pipe_fd, wire.DaemonReady())
                os._exit(status)
            os.setsid()
            os.chdir("/")
            null_fd = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null_fd, fd)
            os.close(null_fd)
            _say(pipe_fd, wire.DaemonReady())
            os.close(pipe_fd)
            status = launcher.run()
    except Exception as error:  # noqa: BLE001 - there is nobody above who could tell of it
        place = traceback.extract_tb(error.__traceback__)[-1]
        log.error(  # noqa: TRY400 - the class and the place alone: a text may hold anything
            "a bug in kmsfs: %s at %s:%s",
            type(error).__name__,
            os.path.basename(place.filename),
            place.lineno,
        )
    finally:
        os._exit(status)


def _say(pipe_fd: int, message: _Said) -> None:
    # Whoever called may have been killed; the mount itself is not affected.
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe_fd, msgspec.json.encode(message) + b"\n")
