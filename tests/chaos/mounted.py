"""The mount that a run is about: its processes, its control socket, and how to mount it anew."""

import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kmsfs.admin import control
from kmsfs.admin.status import MountStatus
from kmsfs.errors import KmsfsError
from kmsfs.views import mountpoint as mounts
from tests.support.mounts import MountedVolume, children_of, process_name, processes_of
from tests.support.sites import Site

# What a replaced daemon, or a launcher's end, may take on a machine that is busy otherwise.
_BACK_S = 30.0


class ChaosMount:
    """One mount, which may have another launcher and daemon at any time.

    Args:
        env: what it is mounted with.

    Attributes:
        volume: for commands.
        launcher_changes: rises when a launcher is killed, and once more when another has mounted:
            odd in between, when the old one's daemon may still answer.
    """

    def __init__(self, site: Site, view: str, env: dict[str, str]) -> None:
        self._site = site
        self._view = view
        self._env = env
        self.launcher_changes = 0
        self.volume = self._mount()
        self.launcher_pid = self.volume.launcher_pid

    @property
    def path(self) -> Path:
        """The mountpoint."""
        return self.volume.path

    def ask(self, request: control.Request) -> control.Answer | None:
        """What the daemon answers; None if it cannot just now, or says no."""
        mount = mounts.find_mount(str(self.path))
        if mount is None:
            return None
        try:
            return control.call(mount.device, os.geteuid(), request)
        except KmsfsError:
            return None

    def status(self) -> MountStatus | None:
        """What it says of itself; None if it cannot just now."""
        answer = self.ask(control.StatusRequest())
        return answer.status if isinstance(answer, control.StatusAnswer) else None

    def pids(self, name: str) -> list[int]:
        """Processes of this name below the launcher."""
        return [pid for pid in children_of(self.launcher_pid) if process_name(pid) == name]

    def kill_daemon(self) -> None:
        """SIGKILL; returns once another serves.

        Raises:
            AssertionError: none came.
        """
        for pid in self.pids("kmsfs-daemon"):
            send(pid, signal.SIGKILL)
            self._await(partial(self._is_served_without, pid), "another daemon serves")

    def kill_launcher(self) -> None:
        """SIGKILL; returns once it is mounted anew.

        Raises:
            AssertionError: it could not be.
        """
        self.launcher_changes += 1
        send(self.launcher_pid, signal.SIGKILL)
        self._await(lambda: self._mount_anew() == 0, "it can be mounted again")
        self.launcher_pid = self.volume.launcher_pid
        self.launcher_changes += 1

    def unlock(self) -> None:
        """Unlock, whichever daemon is there.

        Raises:
            AssertionError: it stays locked.
        """
        self._await(self._unlocked, "the volume is unlocked")

    def leftovers(self) -> list[str]:
        """Processes and mounts that are there though it is unmounted, in words."""
        found = [f"process {pid} ({process_name(pid)})" for pid in processes_of(self.path)]
        table = mounts.mount_table()
        found += [f"mount {m.mountpoint}" for m in table if m.mountpoint == str(self.path)]
        found += [f"file {name}" for name in os.listdir(self.path)]
        return found

    def _mount(self) -> MountedVolume:
        return self._site.mount("--view", self._view, path=self._site.directory / "mnt",
                                env=self._env)  # fmt: skip

    def _mount_anew(self) -> int:
        # In the ramfs view 1 says that it is mounted, and that some files are not there yet.
        arguments = ("mount", self._site.source, self.path, "--view", self._view)
        exit_code = self.volume.kmsfs(*arguments, exit_code=None).exit_code
        return 0 if exit_code == 1 and self._view == "ramfs" else exit_code

    def _is_served_without(self, daemon_pid: int) -> bool:
        status = self.status()
        return status is not None and status.daemon_pid != daemon_pid

    def _unlocked(self) -> bool:
        answer = self.ask(control.UnlockRequest())
        return isinstance(answer, control.Unlocked)

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _BACK_S
        pause = select.poll()
        while not condition():
            assert time.monotonic() < deadline, f"not within {_BACK_S} s: {what}"
            pause.poll(20)


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether there was still somebody to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def locked_bytes(pid: int) -> int:
    """Locked memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmLck of {pid}")
