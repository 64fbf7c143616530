"""What a process of ours gives up once it has what it needs: exec, network, writing to files.

Landlock and seccomp, both by ctypes; no package is needed for either. What a kernel or machine
cannot do is left out and told, see `SandboxReport.gaps`. Nothing here can be undone: that is the
point of it.
"""

import os
from collections.abc import Collection
from typing import Final

import msgspec

from kmsfs import libc
from kmsfs.memory import landlock, seccomp

# A resolver asks again by TCP where an answer was too long for UDP (RFC 7766).
_DNS_PORT: Final = 53


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """Which walls stand around one process.

    Attributes:
        landlock_abi: of the rules in force; 0 for none.
        seccomp: whether a filter is in force.
        gaps: what is open although it should not be, in words.
    """

    landlock_abi: int
    seccomp: bool
    gaps: tuple[str, ...] = ()


def confine_daemon(fill_beneath: int | None) -> SandboxReport:
    """Take from the daemon what it does not need: network, exec, other processes, writing.

    UNIX sockets, reading, and descriptors that are open already stay, as does sending signals.
    To be called before the first thread.

    Args:
        fill_beneath: a descriptor of the ramfs's root, beneath which files are made and
            removed; None where there is none.
    """
    rules = landlock.Rules(fill_beneath=fill_beneath, may_signal=True)
    return _confine(rules, seccomp.UNIX_ONLY)


def confine_worker(connect_ports: Collection[int]) -> SandboxReport:
    """Take from a worker what it does not need once it has credentials.

    No exec, no look into other processes, no file opened for writing, no listening; TCP to
    `connect_ports` and DNS only. UDP stays, which the resolver needs and Landlock does not know.
    """
    rules = landlock.Rules(connect_ports=(*connect_ports, _DNS_PORT))
    return _confine(rules, seccomp.CLIENT_ONLY)


def _confine(rules: landlock.Rules, network: seccomp.Network) -> SandboxReport:
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a thread that runs already would not be confined")
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    gaps: list[str] = []
    try:
        abi = landlock.restrict(rules)
    except OSError as error:
        abi = 0
        gaps.append(f"the kernel refused Landlock: {error.strerror}")
    filtered = seccomp.restrict(network)
    if not filtered:
        gaps.append("system calls are not filtered: no seccomp for this kernel or machine")
    # Without the filter, ports are the only wall before the network.
    needs_ports = not filtered or bool(network.tcp_and_udp_families)
    gaps += landlock.gaps(abi, needs_ports=needs_ports)
    return SandboxReport(landlock_abi=abi, seccomp=filtered, gaps=tuple(gaps))
