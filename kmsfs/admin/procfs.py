"""What the kernel shows of a process and of the machine: read, never assumed."""

import contextlib
import glob
import gzip
import os
import platform
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

_CAP_IPC_LOCK: Final = 14  # linux/capability.h

_SECCOMP_FILTER: Final = 2  # SECCOMP_MODE_FILTER, linux/seccomp.h


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process, as /proc/PID shows it (proc(5)). Sizes are in KiB; a limit of None is none.

    Attributes:
        address_space_kib: VmSize, which mlockall counts against the limit of locked memory.
        may_lock_anything: CAP_IPC_LOCK is in its effective set.
    """

    pid: int
    name: str
    address_space_kib: int
    locked_kib: int
    swapped_kib: int
    seccomp_filtered: bool
    no_new_privileges: bool
    may_lock_anything: bool
    core_limit_bytes: int | None
    memlock_limit_bytes: int | None

    @property
    def can_lock_all(self) -> bool:
        """Whether mlockall succeeds."""
        limit = self.memlock_limit_bytes
        return self.may_lock_anything or limit is None or limit >= self.address_space_kib << 10


@dataclass(frozen=True, slots=True)
class SwapDevice:
    """A line of /proc/swaps.

    Attributes:
        kind: `zram`, which stays in memory, `encrypted`, or `plain`.
    """

    path: str
    kind: str


def process_facts(pid: int) -> ProcessFacts | None:
    """A process as it is now; None once it is gone."""
    try:
        with open(f"/proc/{pid}/status", errors="replace") as file:
            status = dict(line.split(":", 1) for line in file if ":" in line)
        limits = _limits(pid)
    except OSError:
        return None
    return ProcessFacts(
        pid=pid,
        name=status["Name"].strip(),
        address_space_kib=_kib(status, "VmSize"),
        locked_kib=_kib(status, "VmLck"),
        swapped_kib=_kib(status, "VmSwap"),
        seccomp_filtered=int(status.get("Seccomp", "0")) == _SECCOMP_FILTER,
        no_new_privileges=status.get("NoNewPrivs", "0").strip() == "1",
        may_lock_anything=bool(int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1),
        core_limit_bytes=limits.get("Max core file size"),
        memlock_limit_bytes=limits.get("Max locked memory"),
    )


def environment_names(pid: int) -> set[str]:
    """Names of the variables that a process was started with.

    Raises:
        OSError: it is gone, or not for us to see.
    """
    with open(f"/proc/{pid}/environ", "rb") as file:
        return {os.fsdecode(item.partition(b"=")[0]) for item in file.read().split(b"\0") if item}


def parent_pid(pid: int) -> int | None:
    """The parent of a process; None once it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", errors="replace") as file:
        for line in file:
            if line.startswith("PPid:"):
                return int(line.split()[1])
    return None


def is_stuck(pid: int) -> bool:
    """Whether a process or a descendant of it waits in the kernel, where no signal reaches it."""
    for directory in glob.glob(f"/proc/{pid}/task/*"):
        # Either may end meanwhile.
        with contextlib.suppress(OSError):
            with open(f"{directory}/stat", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
            with open(f"{directory}/children") as file:
                children = file.read().split()
            if state == "D" or any(is_stuck(int(child)) for child in children):
                return True
    return False


def mappers_of(device: str) -> list[str]:
    """Programs, with their process ids, that have files of a filesystem mapped."""
    found = []
    major, minor = (int(part) for part in device.split(":"))
    needle = f" {major:02x}:{minor:02x} "
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"{entry.path}/maps", errors="replace") as maps:
                if not any(needle in line for line in maps):
                    continue
            with open(f"{entry.path}/comm", errors="replace") as comm:
                found.append(f"{comm.read().strip()} (pid {entry.name})")
    return found


def swap_devices() -> list[SwapDevice]:
    """Where the kernel swaps to."""
    with open("/proc/swaps", errors="surrogateescape") as file:
        paths = [line.split()[0] for line in file.readlines()[1:] if line.strip()]
    return [SwapDevice(path, _swap_kind(path)) for path in paths]


def core_pattern() -> str:
    """Where the kernel sends core dumps."""
    with open("/proc/sys/kernel/core_pattern", errors="replace") as file:
        return file.read().strip()


def can_hibernate() -> bool:
    """Whether the machine may write its memory to a disk and switch off."""
    try:
        with open("/sys/power/state") as state, open("/sys/power/disk") as disk:
            return "disk" in state.read().split() and "[disabled]" not in disk.read()
    except OSError:
        return False


def zeroes_freed_pages() -> bool:
    """Whether the kernel zeroes every page that it frees (init_on_free)."""
    with open("/proc/cmdline") as file:
        said = re.findall(r"\binit_on_free=(\S+)", file.read())
    if said:
        return said[-1] in ("1", "y", "on")
    return "CONFIG_INIT_ON_FREE_DEFAULT_ON=y" in _kernel_config()


def swap_is_forbidden(pid: int) -> bool:
    """Whether the control group of a process, or one above it, has memory.swap.max = 0."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            paths = [PurePosixPath(line[3:].strip()) for line in file if line.startswith("0::/")]
    except OSError:
        return False
    return any(_swap_max(group) == "0" for path in paths for group in (path, *path.parents))


def _swap_max(group: PurePosixPath) -> str:
    with contextlib.suppress(OSError), open(f"/sys/fs/cgroup{group}/memory.swap.max") as file:
        return file.read().strip()
    return "max"


def _limits(pid: int) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    with open(f"/proc/{pid}/limits") as file:
        for line in file.readlines()[1:]:
            name, soft = line[:26].strip(), line[26:].split()[0]
            found[name] = None if soft == "unlimited" else int(soft)
    return found


def _kib(status: dict[str, str], key: str) -> int:
    return int(status[key].split()[0]) if key in status else 0


def _swap_kind(path: str) -> str:
    name = os.path.basename(os.path.realpath(path))
    if name.startswith("zram"):
        return "zram"
    with contextlib.suppress(OSError), open(f"/sys/block/{name}/dm/uuid") as file:
        if file.read().startswith("CRYPT-"):
            return "encrypted"
    return "plain"


def _kernel_config() -> str:
    with contextlib.suppress(OSError), gzip.open("/proc/config.gz", "rt") as packed:
        return packed.read()
    with contextlib.suppress(OSError), open(f"/boot/config-{platform.release()}") as plain:
        return plain.read()
    return ""
