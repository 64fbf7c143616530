"""Landlock: what a process may do to files and to TCP ports, by the kernel's own rules.

By ctypes: the kernel's interface is three calls, which no kept library covers and no package is
needed for. Numbers are those of linux/landlock.h and, for what is newer than a machine's headers,
of the kernel's Documentation/userspace-api/landlock.rst, which also says which ABI has what.
"""

import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from kmsfs import libc

_SYS_CREATE_RULESET: Final = 444
_SYS_ADD_RULE: Final = 445
_SYS_RESTRICT_SELF: Final = 446

_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_RULE_NET_PORT: Final = 2

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE_CHAR: Final = 1 << 6
_MAKE_DIR: Final = 1 << 7
_MAKE_REG: Final = 1 << 8
_MAKE_SOCK: Final = 1 << 9
_MAKE_FIFO: Final = 1 << 10
_MAKE_BLOCK: Final = 1 << 11
_MAKE_SYM: Final = 1 << 12
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15

_BIND_TCP: Final = 1 << 0
_CONNECT_TCP: Final = 1 << 1

_SCOPE_ABSTRACT_UNIX_SOCKET: Final = 1 << 0
_SCOPE_SIGNAL: Final = 1 << 1

# What changes anything, and exec; reading stays free. By the ABI that knows it first.
_FS_SINCE: Final = {
    1: _EXECUTE
    | (_WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_CHAR | _MAKE_DIR | _MAKE_REG)
    | (_MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _MAKE_SYM),
    2: _REFER,
    3: _TRUNCATE,
    5: _IOCTL_DEV,
}
_NET_SINCE: Final = 4
_SCOPES_SINCE: Final = 6
_REFER_SINCE: Final = 2

# What filling a directory with files, links and directories takes.
_FILL: Final = (
    (_WRITE_FILE | _TRUNCATE | _MAKE_REG | _MAKE_DIR | _MAKE_SYM)
    | (_REMOVE_FILE | _REMOVE_DIR | _REFER)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """What is left of the rights that Landlock takes away; the default is nothing.

    Attributes:
        fill_beneath: a descriptor (O_PATH will do) of a directory in which everything but
            executing, sockets, pipes and devices is allowed.
        connect_ports: TCP ports that may be connected to.
        may_signal: whether processes that are not confined by this may be signalled.
    """

    fill_beneath: int | None = None
    connect_ports: Collection[int] = ()
    may_signal: bool = False


def restrict(rules: Rules) -> int:
    """Hold this process to the rules, for good; it must have one thread and no new privileges.

    Descriptors that are open already keep their rights. Where the kernel's Landlock is older,
    the part of the rules that it knows is enforced.

    Returns: the ABI in force; 0 where there is none, or where the one there is (1) could not do
        without forbidding what `fill_beneath` is to allow: links and renames.
    Raises:
        OSError: the kernel has it and refuses.
    """
    try:
        abi = kernel_abi()
    except OSError:
        return 0
    if rules.fill_beneath is not None and abi < _REFER_SINCE:
        return 0
    access_fs = 0
    for since, accesses in _FS_SINCE.items():
        access_fs |= accesses if since <= abi else 0
    has_net, has_scopes = abi >= _NET_SINCE, abi >= _SCOPES_SINCE
    scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | (0 if rules.may_signal else _SCOPE_SIGNAL)
    ruleset_fd = _create_ruleset(
        access_fs, _BIND_TCP | _CONNECT_TCP if has_net else 0, scoped if has_scopes else 0
    )
    try:
        if rules.fill_beneath is not None:
            _add(
                ruleset_fd, _RULE_PATH_BENEATH, _PathBeneath(access_fs & _FILL, rules.fill_beneath)
            )
        for port in sorted(rules.connect_ports) if has_net else ():
            _add(ruleset_fd, _RULE_NET_PORT, _NetPort(_CONNECT_TCP, port))
        _restrict_self(ruleset_fd)
    finally:
        os.close(ruleset_fd)
    return abi


def gaps(abi: int, *, needs_ports: bool) -> tuple[str, ...]:
    """What an ABI leaves open of what `restrict` is for, in words.

    Args:
        needs_ports: whether nothing else keeps the process from the network.
    """
    if abi == 0:
        found = ["files can be written and programs started: no Landlock (Linux 5.19)"]
    elif abi < 3:
        found = ["files can be cut: Landlock is too old (Linux 6.2)"]
    else:
        found = []
    if needs_ports and abi < _NET_SINCE:
        found.append("any TCP port can be reached: no Landlock that limits them (Linux 6.7)")
    return tuple(found)


# --- system calls ------------------------------------------------------------------------------


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr as of ABI 6."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    """Of a directory, whatever path or mount it is reached by."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    """Of any host."""

    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def kernel_abi() -> int:
    """The version of Landlock that the kernel has; at least 1.

    Raises:
        OSError: ENOSYS before Linux 5.13 or where it is not built in, EOPNOTSUPP where it is
            switched off.
    """
    version = ctypes.c_uint(_CREATE_RULESET_VERSION)
    return libc.system_call(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), version)


def _create_ruleset(access_fs: int, access_net: int, scoped: int) -> int:
    """A descriptor of a ruleset that handles these, so forbids all of it that no rule allows.

    An older kernel takes the longer struct as long as what it does not know is zero.
    """
    attr = _Ruleset(access_fs, access_net, scoped)
    return libc.system_call(
        _SYS_CREATE_RULESET,
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
        ctypes.c_uint(0),
    )


def _add(ruleset_fd: int, kind: int, attr: ctypes.Structure) -> None:
    libc.system_call(
        _SYS_ADD_RULE,
        ctypes.c_int(ruleset_fd),
        ctypes.c_int(kind),
        ctypes.byref(attr),
        ctypes.c_uint(0),
    )


def _restrict_self(ruleset_fd: int) -> None:
    """EPERM without `PR_SET_NO_NEW_PRIVS`, E2BIG within 16 rulesets already."""
    libc.system_call(_SYS_RESTRICT_SELF, ctypes.c_int(ruleset_fd), ctypes.c_uint(0))
