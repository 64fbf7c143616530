"""Processes and mounts that a test leaves behind.

The test process adopts orphans (PR_SET_CHILD_SUBREAPER), so that whatever a test started and
lost, in whatever session and environment, is found among its descendants.
"""

import contextlib
import os
import select
import signal
from pathlib import Path

from kmsfs import libc
from kmsfs.views import mountpoint as mounts

_PR_SET_CHILD_SUBREAPER = 36

_END_S = 2.0
_ROUNDS = 5

_kept: set[int] = set()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def keep(pid: int) -> None:
    """Leave a process alone that outlives its test on purpose, such as a session's server."""
    _kept.add(pid)


def children() -> set[int]:
    """Children of this process that are alive, the kept ones excepted; zombies are reaped."""
    found = set()
    text = ""
    for path in Path("/proc/self/task").glob("*/children"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            text += path.read_text()
    for pid in map(int, text.split()):
        if pid not in _kept and not _reaped(pid):
            found.add(pid)
    return found


def clean_up(before: set[int], directory: Path) -> list[str]:
    """End what is left since `before`, unmount what is mounted below `directory`.

    Returns: what was found, in words; empty if nothing.
    """
    problems = []
    for mount in reversed(mounts.mount_table()):
        if Path(mount.mountpoint).is_relative_to(directory):
            problems.append(f"mount {mount.mountpoint}")
            mounts.unmount(mount.mountpoint, lazy=True)
    seen = set(before)
    # Children of one that ends meanwhile become ours, and are found the next time round.
    while left := children() - seen:
        seen |= left
        for pid in left:
            # Without this one a process that is just ending would be reported.
            if not _ends(pid, _END_S if problems else 0.2):
                problems.append(f"process {pid} ({_name(pid)})")
    # The same holds for what is killed.
    for _ in range(_ROUNDS):
        for pid in children() - before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _ends(pid, _END_S)
    return problems


def _ends(pid: int, timeout_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        ended = bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)
    return ended and _reaped(pid)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return "unknown"
