"""On-change hooks: programs that the system configuration names, run when served files change.

A hook gets its arguments as they are configured (there is no shell), a clean environment and no
standard streams. What it is told is where the mount is and how many files changed, not which:
whoever may write the source does not choose what a program of root reads.
"""

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kmsfs.decryptor import wire
from kmsfs.launcher import children
from kmsfs.launcher.children import Child
from kmsfs.settings import OnChange

TIMEOUT_S: Final = 30.0
"""A hook that takes longer is killed, with all of its process group."""

# Changes that follow one another this closely run a hook once; one that has waited for the end
# of a long row of them runs all the same.
_SETTLE_S: Final = 0.5
_MAX_SETTLE_S: Final = 5.0

# For the kernel to end what was killed.
_KILLED_S: Final = 2.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Hook:
    """One hook, what is due of it, and how it went so far.

    Attributes:
        due_at, latest_at: when it is to run next, on the monotonic clock; None if it is not.
        changed: how many files changed since it was last started.
    """

    number: int
    settings: OnChange
    due_at: float | None = None
    latest_at: float = 0.0
    changed: int = 0
    child: Child | None = None
    kill_at: float = 0.0
    killed: bool = False
    runs: int = 0
    failures: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        """What it runs, for people."""
        return " ".join(self.settings.argv)


class Hooks:
    """Runs the hooks of one mount, each one at most once at a time. It never waits for one.

    Args:
        report: told after each run how a hook went so far.
    """

    def __init__(
        self,
        hooks: tuple[OnChange, ...],
        mountpoint: str,
        report: Callable[[wire.HookReport], None],
    ) -> None:
        self._hooks = [_Hook(number, settings) for number, settings in enumerate(hooks)]
        self._environment = {**children.daemon_environment(), "KMSFS_MOUNTPOINT": mountpoint}
        self._report = report

    def note(self, changed: dict[int, int]) -> None:
        """Have hooks run soon: by a hook's number, how many of its files changed."""
        now = time.monotonic()
        for number, count in changed.items():
            if not 0 <= number < len(self._hooks):
                log.warning("a change was reported for on-change hook %d: there is none", number)
                continue
            hook = self._hooks[number]
            if hook.due_at is None:
                hook.latest_at = now + _MAX_SETTLE_S
            hook.due_at = min(now + _SETTLE_S, hook.latest_at)
            hook.changed += count

    def note_all(self) -> None:
        """Have every hook run: what changed while nobody looked is not known."""
        self.note({hook.number: 0 for hook in self._hooks})

    def report_all(self) -> None:
        """Report every hook that has run, to a daemon that does not know yet."""
        for hook in self._hooks:
            if hook.runs or hook.failures:
                self._report(_record(hook))

    def fds(self) -> list[int]:
        """Descriptors that turn readable when `attend` has something to do."""
        return [hook.child.pidfd for hook in self._hooks if hook.child is not None]

    def pause_ms(self) -> float | None:
        """After this time `attend` has something to do; None if it need not be called."""
        moments = [
            hook.kill_at if hook.child is not None else hook.due_at
            for hook in self._hooks
            if not hook.killed and (hook.child is not None or hook.due_at is not None)
        ]
        wanted = [moment for moment in moments if moment is not None]
        return max(0.0, min(wanted) - time.monotonic()) * 1000 if wanted else None

    def attend(self) -> None:
        """Take note of hooks that ended, kill those that take too long, start what is due."""
        now = time.monotonic()
        for hook in self._hooks:
            if hook.child is not None:
                if children.readable(hook.child.pidfd, 0):
                    self._ended(hook, hook.child)
                elif not hook.killed and hook.kill_at <= now:
                    log.error("on-change hook %r takes more than %.0f s", hook.name, TIMEOUT_S)
                    hook.killed = True
                    _kill_group(hook.child)
            if hook.child is None and hook.due_at is not None and hook.due_at <= now:
                self._start(hook, now)

    def end(self) -> None:
        """Kill what runs, and run nothing more."""
        for hook in self._hooks:
            hook.due_at = None
            if hook.child is not None:
                _kill_group(hook.child)
        for hook in self._hooks:
            if hook.child is not None and hook.child.wait(_KILLED_S) is None:
                log.error("on-change hook %r cannot be killed", hook.name)
            hook.child = None

    def _start(self, hook: _Hook, now: float) -> None:
        environment = {**self._environment, "KMSFS_CHANGED": str(hook.changed)}
        hook.due_at, hook.changed = None, 0
        hook.runs += 1
        try:
            hook.child = _spawn(hook.settings.argv, environment)
        except OSError as error:
            self._failed(hook, error.strerror or type(error).__name__)
            return
        hook.kill_at, hook.killed = now + TIMEOUT_S, False

    def _ended(self, hook: _Hook, child: Child) -> None:
        # Before it is reaped: until then nobody else can have its number.
        _kill_group(child)
        status = child.wait(0)
        hook.child = None
        if hook.killed:
            self._failed(hook, f"killed: it took more than {TIMEOUT_S:.0f} s")
        elif status:
            said = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
            self._failed(hook, said)
        else:
            hook.problem = ""
            log.info("on-change hook %r has run", hook.name)
            self._report(_record(hook))

    def _failed(self, hook: _Hook, problem: str) -> None:
        hook.failures += 1
        hook.problem = problem
        log.error("on-change hook %r failed: %s", hook.name, problem)
        self._report(_record(hook))


def _record(hook: _Hook) -> wire.HookReport:
    return wire.HookReport(
        hook=hook.number, runs=hook.runs, failures=hook.failures, problem=hook.problem
    )


def _spawn(argv: tuple[str, ...], environment: dict[str, str]) -> Child:
    """In a process group of its own, which ends with it.

    Raises:
        OSError: there is no such program, or it cannot be started.
    """
    program = shutil.which(argv[0], path=environment["PATH"])
    if program is None:
        raise FileNotFoundError(None, "there is no such program", argv[0])
    children.keep_descriptors()
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with children.closing(null_fd):
        pid = os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, null_fd, fd) for fd in (0, 1, 2)],
            setpgroup=0,
            setsigmask=(),
            # Python ignores the last two, and what is ignored stays so.
            setsigdef=[*children.CAUGHT_SIGNALS, signal.SIGPIPE, signal.SIGXFSZ],
        )
    return Child(pid, os.pidfd_open(pid))


def _kill_group(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    # It may have left the group.
    child.kill(signal.SIGKILL)
