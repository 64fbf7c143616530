"""seccomp filters: system calls that a process of ours never makes, refused by the kernel.

The filters name what is forbidden, not what is allowed: an interpreter and its libraries make
other calls with every release, and one forgotten call would end a mount. What is forbidden is
what starts programs, looks into processes, changes the machine, or would get around the other
walls (io_uring makes calls that no filter sees).

By ctypes, as a BPF program of some hundred instructions; no package is needed for that. Layout
and numbers: seccomp(2), linux/seccomp.h, linux/filter.h, linux/audit.h, and the kernel's system
call tables. Only 64-bit x86 and ARM are known; elsewhere there is no filter, which is reported.
"""

import errno
import platform
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kmsfs import libc

# Offsets in struct seccomp_data; an argument's lower half comes first on both machines.
_OFFSET_NUMBER: Final = 0
_OFFSET_MACHINE: Final = 4
_OFFSET_ARGUMENTS: Final = 16

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_JUMP_IF_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06

_RET_KILL_PROCESS: Final = 0x80000000
_RET_ERRNO: Final = 0x00050000
_RET_ALLOW: Final = 0x7FFF0000

# Calls of the x32 ABI carry this bit and share the machine's number (asm/unistd.h).
_X32_BIT: Final = 0x40000000

_MSG_FASTOPEN: Final = 0x20000000
_SOCK_TYPE_MASK: Final = 0xF  # linux/net.h; above it are flags

_REFUSED: Final = errno.EPERM

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor's calls, by name; what it does not have is not in it."""

    audit_arch: int
    has_x32: bool
    numbers: dict[str, int]


# Added since Linux 5.1: the same on every machine.
_SHARED_NUMBERS: Final = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
}

_X86_64: Final = Machine(
    audit_arch=0xC000003E,
    has_x32=True,
    numbers=_SHARED_NUMBERS
    | {
        "socket": 41,
        "sendto": 44,
        "sendmsg": 46,
        "bind": 49,
        "listen": 50,
        "execve": 59,
        "ptrace": 101,
        "syslog": 103,
        "modify_ldt": 154,
        "pivot_root": 155,
        "adjtimex": 159,
        "chroot": 161,
        "acct": 163,
        "settimeofday": 164,
        "mount": 165,
        "umount2": 166,
        "swapon": 167,
        "swapoff": 168,
        "reboot": 169,
        "sethostname": 170,
        "setdomainname": 171,
        "iopl": 172,
        "ioperm": 173,
        "init_module": 175,
        "delete_module": 176,
        "quotactl": 179,
        "clock_settime": 227,
        "kexec_load": 246,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "perf_event_open": 298,
        "fanotify_init": 300,
        "open_by_handle_at": 304,
        "clock_adjtime": 305,
        "sendmmsg": 307,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "finit_module": 313,
        "kexec_file_load": 320,
        "bpf": 321,
        "execveat": 322,
        "userfaultfd": 323,
    },
)

_AARCH64: Final = Machine(
    audit_arch=0xC00000B7,
    has_x32=False,
    numbers=_SHARED_NUMBERS
    | {
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "chroot": 51,
        "quotactl": 60,
        "acct": 89,
        "unshare": 97,
        "kexec_load": 104,
        "init_module": 105,
        "delete_module": 106,
        "clock_settime": 112,
        "syslog": 116,
        "ptrace": 117,
        "reboot": 142,
        "sethostname": 161,
        "setdomainname": 162,
        "settimeofday": 170,
        "adjtimex": 171,
        "socket": 198,
        "bind": 200,
        "listen": 201,
        "sendto": 206,
        "sendmsg": 211,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "execve": 221,
        "swapon": 224,
        "swapoff": 225,
        "perf_event_open": 241,
        "fanotify_init": 262,
        "open_by_handle_at": 265,
        "clock_adjtime": 266,
        "setns": 268,
        "sendmmsg": 269,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "finit_module": 273,
        "bpf": 280,
        "execveat": 281,
        "userfaultfd": 282,
        "kexec_file_load": 294,
    },
)

MACHINES: Final = {"x86_64": _X86_64, "aarch64": _AARCH64}
"""By the name that uname(2) gives."""

# Which argument holds the MSG_* flags.
_FLAGS_ARGUMENT: Final = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}


@dataclass(frozen=True, slots=True)
class Network:
    """Which sockets may be made.

    Attributes:
        families: of any type.
        tcp_and_udp_families: plain TCP and UDP only. Landlock knows no ports of MPTCP and SCTP,
            and a raw socket needs none.
    """

    families: tuple[int, ...]
    tcp_and_udp_families: tuple[int, ...] = ()


UNIX_ONLY: Final = Network((socket.AF_UNIX,))

# The resolver asks netlink which addresses this machine has.
CLIENT_ONLY: Final = Network((socket.AF_UNIX, socket.AF_NETLINK), (socket.AF_INET, socket.AF_INET6))


def restrict(network: Network) -> bool:
    """Refuse, from now on and for good, what no process of ours does, and other sockets.

    The process must have one thread and no new privileges. What is refused gives EPERM; a call
    by another machine's table (32-bit x86, x32) ends the process.

    Returns: whether it is in force; not on machines that are not in `MACHINES`, and not where
        the kernel has no filters.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return False
    try:
        libc.set_seccomp_filter(program(machine, network))
    except OSError:
        return False
    return True


def program(machine: Machine, network: Network) -> bytes:
    """The BPF program of a filter."""
    instructions: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_MACHINE),
        (_JUMP_IF_EQUAL, 1, 0, machine.audit_arch),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine.has_x32:
        instructions += [
            (_JUMP_IF_AT_LEAST, 0, 1, _X32_BIT),
            (_RETURN, 0, 0, _RET_KILL_PROCESS),
        ]
    for name, number in machine.numbers.items():
        if name == "socket":
            instructions += _on_call(number, _check_socket(network))
        elif name in _FLAGS_ARGUMENT:
            instructions += _on_call(number, _check_flags(_FLAGS_ARGUMENT[name]))
        else:
            instructions += _on_call(number, [_refuse()])
    instructions.append(_allow())
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _allow() -> Instruction:
    return _RETURN, 0, 0, _RET_ALLOW


def _refuse() -> Instruction:
    return _RETURN, 0, 0, _RET_ERRNO | _REFUSED


def _load_argument(index: int) -> Instruction:
    """Its lower half: all arguments looked at here are ints, of which the kernel takes no more."""
    return _LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * index


def _on_call(number: int, body: list[Instruction]) -> list[Instruction]:
    """Run a body, which ends in a return, for one call."""
    return [(_JUMP_IF_EQUAL, 0, len(body), number), *body]


def _allow_if(values: Iterable[int]) -> list[Instruction]:
    """Allow the call if what was loaded is one of these; else go on."""
    found: list[Instruction] = []
    for value in values:
        found += [(_JUMP_IF_EQUAL, 0, 1, value), _allow()]
    return found


def _refuse_unless(values: tuple[int, ...]) -> list[Instruction]:
    """Go on if what was loaded is one of these; else refuse the call."""
    count = len(values)
    jumps = [(_JUMP_IF_EQUAL, count - at, 0, value) for at, value in enumerate(values)]
    return [*jumps, _refuse()]


def _check_socket(network: Network) -> list[Instruction]:
    found = [_load_argument(0), *_allow_if(network.families)]
    if not network.tcp_and_udp_families:
        return [*found, _refuse()]
    return [
        *found,
        *_refuse_unless(network.tcp_and_udp_families),
        _load_argument(1),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        *_refuse_unless((socket.SOCK_STREAM, socket.SOCK_DGRAM)),
        _load_argument(2),
        *_refuse_unless((0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)),
        _allow(),
    ]


def _check_flags(index: int) -> list[Instruction]:
    """Refuse TCP Fast Open, which connects where Landlock does not look."""
    return [
        _load_argument(index),
        (_JUMP_IF_ANY_BIT, 0, 1, _MSG_FASTOPEN),
        _refuse(),
        _allow(),
    ]
