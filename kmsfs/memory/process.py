"""What a process does to keep its memory to itself, and a report of what holds."""

import contextlib
import os
import resource
import signal
from typing import Final

import msgspec

from kmsfs import libc
from kmsfs.memory.sandbox import SandboxReport

# glibc: freed memory is overwritten, freed chunks and thread stacks are not kept for reuse.
# CPython: its own arenas, which never scrub, are switched off. Set before exec; read by
# zygote and workers.
SCRUBBING_ENVIRONMENT: Final = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": (
        "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"
    ),
}


DAEMON_DESCRIPTORS: Final = 1024
"""What the daemon's limit of descriptors is raised to."""

MIN_DAEMON_DESCRIPTORS: Final = 128
"""With fewer it does not serve."""

# Of these, for all but ciphertext on its way to a worker: the mount and the source, launcher and
# zygote, two for each of 8 workers, 16 connections on the control socket, and two for each of
# 64 threads that wait for a slow disk.
_RESERVED_DESCRIPTORS: Final = 256


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """Which protections hold in one process.

    Attributes:
        sandbox: what confines it; None where nothing does yet.
    """

    undumpable: bool
    core_limit_zero: bool
    memory_locked: bool
    allocator_scrubs: bool
    sandbox: SandboxReport | None = None


def harden(name: str) -> None:
    """Make this process undumpable and without core files, and name it.

    Undumpable also means: no ptrace and no /proc/PID/mem for other processes of the same user.
    exec resets it, so every process calls this for itself.

    Args:
        name: for ps and /proc/PID/comm, 15 bytes at most.
    """
    libc.set_process_name(name)
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forbid_new_privileges() -> None:
    """No setuid program started from here gains anything."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


def become(uid: int, gid: int) -> None:
    """Turn from root into an unprivileged user with no capability but that of locking memory.

    Undumpable again afterwards: a change of user resets it. For a process without other threads.

    Raises:
        OSError: not root, or a limit of the user's forbids it.
    """
    libc.prctl(libc.PR_SET_KEEPCAPS, 1)
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for number in range(last + 1):
        libc.prctl(libc.PR_CAPBSET_DROP, number)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    libc.set_capabilities(frozenset({libc.CAP_IPC_LOCK}))
    libc.prctl(libc.PR_SET_DUMPABLE, 0)


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent's spawning thread ends.

    Only for children of a single-threaded parent: the signal follows the thread.
    """
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def lock_all_memory() -> bool:
    """Lock what this process has mapped and will map, page by page as it is touched.

    Returns: whether it could; a low RLIMIT_MEMLOCK refuses it.
    """
    with contextlib.suppress(OSError):
        libc.mlockall(libc.MCL_CURRENT | libc.MCL_FUTURE | libc.MCL_ONFAULT)
        return True
    return False


def raise_memlock_limit(wanted_bytes: int, *, pid: int = 0) -> None:
    """Raise the soft limit of locked memory to `wanted_bytes`, as far as that is permitted.

    Children inherit it. What is really available shows in `Arena.budget_bytes`.

    Args:
        pid: another process of the same user; 0 is this one.
    """
    _raise_limit(resource.RLIMIT_MEMLOCK, wanted_bytes, pid)


def raise_descriptor_limit(wanted: int, *, pid: int = 0) -> None:
    """Raise the soft limit of descriptors to `wanted`, as far as that is permitted.

    Args:
        pid: another process of the same user; 0 is this one.
    """
    _raise_limit(resource.RLIMIT_NOFILE, wanted, pid)


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def descriptors_for_ciphertext(*, at_least: int) -> int:
    """How many ciphertexts the daemon may have open at once; the rest of its limit is for others.

    Args:
        at_least: even where the limit leaves fewer.
    """
    return max(at_least, descriptor_limit() - _RESERVED_DESCRIPTORS)


def _raise_limit(limit: int, wanted: int, pid: int) -> None:
    soft, hard = resource.prlimit(pid, limit)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    reachable = hard if hard == resource.RLIM_INFINITY else max(hard, wanted)
    with contextlib.suppress(ValueError, OSError):
        resource.prlimit(pid, limit, (wanted, reachable))
        return
    with contextlib.suppress(ValueError, OSError):
        resource.prlimit(pid, limit, (hard, hard))


def report(*, memory_locked: bool, sandbox: SandboxReport | None = None) -> ProcessReport:
    """Read back from the kernel what holds for this process.

    Args:
        memory_locked: what `lock_all_memory` answered; the daemon locks its slots only.
        sandbox: what confining the process answered; the kernel does not tell it again.
    """
    return ProcessReport(
        undumpable=libc.prctl(libc.PR_GET_DUMPABLE) == 0,
        core_limit_zero=resource.getrlimit(resource.RLIMIT_CORE)[0] == 0,
        memory_locked=memory_locked,
        allocator_scrubs=all(os.environ.get(k) == v for k, v in SCRUBBING_ENVIRONMENT.items()),
        sandbox=sandbox,
    )
