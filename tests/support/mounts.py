"""Real mounts for tests: the command line mounts, ordinary system calls read."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kmsfs.admin import control
from kmsfs.views import mountpoint as mounts
from tests.support.commands import Finished, run_kmsfs

# Catches what never comes, not what is slow.
_WAIT_S = 20.0

SEEN_S = 2.0
"""A change in the source is seen within this, without a remount."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = _WAIT_S) -> None:
    """Poll a condition that another process brings about.

    Raises:
        AssertionError: it has not come true in time.
    """
    deadline = time.monotonic() + timeout_s
    pause = select.poll()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.poll(5)


def wait_gone(pid: int, timeout_s: float = _WAIT_S) -> None:
    """Wait for the end of any process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(timeout_s * 1000), f"process {pid} has not ended"
    finally:
        os.close(pidfd)


@dataclass
class MountedVolume:
    """One mount under test."""

    source: Path
    path: Path
    env: Mapping[str, str]

    def kmsfs(self, *arguments: str | Path, exit_code: int | None = 0) -> Finished:
        """Run a command of kmsfs in the mount's environment."""
        return run_kmsfs(arguments, env=self.env, exit_code=exit_code)

    def status(self) -> dict[str, Any]:
        """What `kmsfs status --json` shows, asked without starting a process."""
        mount = mounts.find_mount(str(self.path))
        assert mount is not None
        answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
        assert isinstance(answer, control.StatusAnswer)
        found: dict[str, Any] = json.loads(msgspec.json.encode(answer.status))
        return found

    def workers(self) -> list[int]:
        """Process ids of the workers alive now, as the kernel has them."""
        return [pid for pid in processes_of(self.path) if process_name(pid) == "kmsfs-worker"]

    @property
    def mount(self) -> mounts.Mount | None:
        """The mount table's line; None once unmounted."""
        found = mounts.find_mount(str(self.path))
        return found if found is not None and mounts.is_ours(found) else None

    def names(self, directory: str = "") -> list[str]:
        """Served names in a directory, in order; the ramfs view's own layout is not among them."""
        found = os.listdir(self.path / directory)
        return sorted(name for name in found if directory or not name.startswith(".."))

    def failing(self) -> dict[str, str]:
        """The files that `kmsfs status` shows as failing, and the name of each one's error."""
        return {item["path"]: item["reason"].partition(":")[0] for item in self.status()["failing"]}

    @property
    def launcher_pid(self) -> int:
        """Process id of the launcher, which is the daemon's parent."""
        return parent_of(self.status()["daemon_pid"])

    def umount(self) -> None:
        """`kmsfs umount`."""
        self.kmsfs("umount", self.path)


@dataclass
class Mounter:
    """Mounts volumes and cleans up after them, whatever state they are in.

    Attributes:
        view: what is mounted unless the test says otherwise; empty for what kmsfs takes itself.
    """

    env: Mapping[str, str]
    view: str = ""
    mounted: list[MountedVolume] = field(default_factory=list)

    def mount(
        self,
        source: Path,
        path: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        exit_code: int = 0,
        prefix: Sequence[str] = (),
    ) -> MountedVolume:
        """Mount in the background, as a user would; the mount is ready on return.

        Args:
            prefix: a program to run the command under, with its arguments.
        """
        path.mkdir(exist_ok=True)
        volume = MountedVolume(source, path, env or self.env)
        self.mounted.append(volume)
        view = ("--view", self.view) if self.view else ()
        run_kmsfs(
            ["mount", source, path, *view, *arguments],
            env=volume.env,
            exit_code=exit_code,
            prefix=prefix,
        )
        return volume

    def clean_up(self) -> list[str]:
        """Unmount everything; returns what did not end by itself."""
        problems = []
        for volume in self.mounted:
            pids = processes_of(volume.path)
            while volume.mount is not None:
                if volume.kmsfs("umount", volume.path, exit_code=None).exit_code != 0:
                    mounts.unmount(str(volume.path), lazy=True)
            for pid in pids:
                try:
                    wait_gone(pid)
                except AssertionError:
                    problems.append(f"process {pid} of {volume.path} did not end")
                    os.kill(pid, signal.SIGKILL)
        return problems


def parent_of(pid: int) -> int:
    """Parent process id."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    raise AssertionError(f"no parent of {pid}")


def children_of(pid: int) -> list[int]:
    """All living descendants of a process, nearest first."""
    found: list[int] = []
    pending = [pid]
    while pending:
        current = pending.pop(0)
        try:
            text = Path(f"/proc/{current}/task/{current}/children").read_text()
        except OSError:
            continue
        children = [int(child) for child in text.split()]
        found += children
        pending += children
    return found


def processes_of(path: Path) -> list[int]:
    """Launchers whose command line names a mountpoint, and all their descendants."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        if name == "kmsfs-launcher" and os.fsencode(path) in argv:
            found += [int(entry.name), *children_of(int(entry.name))]
    return found


def process_name(pid: int) -> str:
    """/proc/PID/comm; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """/proc/PID/environ, as it was at exec."""
    raw = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(item.split("=", 1) for item in raw.split("\0") if "=" in item)


def strerror_of_cat(path: Path, env: Mapping[str, str] | None = None) -> str:
    """What `cat` says when it cannot read a file; empty if it can."""
    done = subprocess.run(
        ["cat", str(path)],
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stderr.strip().rpartition(": ")[2] if done.returncode else ""
