"""System calls that Python does not offer, as typed functions. Each raises OSError.

Numbers are those of the generic system call table, which x86-64 and arm64 share for calls added
since Linux 5.1; constants are from the kernel's uapi headers.
"""

import ctypes
import os
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)

PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")

_SYS_OPEN_TREE: Final = 428
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442
_SYS_MEMFD_SECRET: Final = 447

# _LINUX_CAPABILITY_VERSION_3 of linux/capability.h.
_CAPABILITY_VERSION: Final = 0x20080522
CAP_IPC_LOCK: Final = 14

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_CLONE_NEWNS: Final = 0x20000
_OPEN_TREE_CLONE: Final = 1
_MOUNT_ATTR_RDONLY: Final = 1

_PROT_READ: Final = 1
_PROT_WRITE: Final = 2
_MAP_SHARED: Final = 1
_MAP_PRIVATE: Final = 2
_MAP_ANONYMOUS: Final = 0x20
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

MADV_DONTFORK: Final = 10
MADV_DONTDUMP: Final = 16

MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4

PR_SET_PDEATHSIG: Final = 1
PR_SET_KEEPCAPS: Final = 8
PR_CAPBSET_DROP: Final = 24
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38

_SECCOMP_MODE_FILTER: Final = 2
_BPF_INSTRUCTION_BYTES: Final = 8

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_NOATIME: Final = 1024
MS_REC: Final = 16384
MS_SLAVE: Final = 1 << 19

MNT_FORCE: Final = 1
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8


def _raise_errno(what: str | None = None) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def map_shared(fd: int, size_bytes: int) -> int:
    """mmap `fd` from its start, shared, readable and writable; returns the address."""
    return _mmap(fd, size_bytes, _MAP_SHARED)


def map_anonymous(size_bytes: int) -> int:
    """mmap private zeroed memory, readable and writable; returns the address."""
    return _mmap(-1, size_bytes, _MAP_PRIVATE | _MAP_ANONYMOUS)


def _mmap(fd: int, size_bytes: int, flags: int) -> int:
    address: int | None = _libc.mmap(None, size_bytes, _PROT_READ | _PROT_WRITE, flags, fd, 0)
    if address is None or address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def munmap(address: int, size_bytes: int) -> None:
    """Unmap; nothing may hold a view of the range any more."""
    if _libc.munmap(address, size_bytes):
        _raise_errno()


def mlock(address: int, size_bytes: int) -> None:
    """Keep a range in memory and out of swap until it is unmapped."""
    if _libc.mlock(address, size_bytes):
        _raise_errno()


def mlockall(flags: int) -> None:
    """Lock the whole process (`MCL_*`)."""
    if _libc.mlockall(flags):
        _raise_errno()


def madvise(address: int, size_bytes: int, advice: int) -> None:
    """Advise the kernel about a range (`MADV_*`)."""
    if _libc.madvise(address, size_bytes, advice):
        _raise_errno()


def memfd_secret() -> int:
    """A descriptor of memory that the kernel maps nowhere else; close-on-exec.

    Raises:
        OSError: ENOSYS before Linux 5.14 or where it is switched off (secretmem.enable).
    """
    fd: int = _libc.syscall(_SYS_MEMFD_SECRET, ctypes.c_uint(os.O_CLOEXEC))
    if fd < 0:
        _raise_errno()
    return fd


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(directory_fd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2) with `RESOLVE_*`; the descriptor is close-on-exec."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    fd: int = _libc.syscall(
        _SYS_OPENAT2,
        ctypes.c_int(directory_fd),
        os.fsencode(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        _raise_errno(path)
    return fd


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument; returns its result."""
    result: int = _libc.prctl(option, value, 0, 0, 0)
    if result < 0:
        _raise_errno()
    return result


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def set_capabilities(numbers: frozenset[int]) -> None:
    """Keep exactly these capabilities, permitted and effective (capset(2))."""
    data = (_CapData * 2)()
    for number in numbers:
        data[number // 32].effective |= 1 << number % 32
        data[number // 32].permitted |= 1 << number % 32
    header = _CapHeader(_CAPABILITY_VERSION, 0)
    if _libc.capset(ctypes.byref(header), data):
        _raise_errno()


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def set_seccomp_filter(program: bytes) -> None:
    """Have the kernel run a BPF program on every system call of this thread and of what it
    starts from now on, for good (seccomp(2), SECCOMP_SET_MODE_FILTER).

    Args:
        program: instructions of 8 bytes (struct sock_filter), copied by the kernel.

    Raises:
        OSError: EINVAL where the kernel has no filters or refuses the program, EACCES without
            `PR_SET_NO_NEW_PRIVS`.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _FilterProgram(len(program) // _BPF_INSTRUCTION_BYTES, ctypes.addressof(buffer))
    if _libc.prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0):
        _raise_errno()


def system_call(number: int, *arguments: object) -> int:
    """A call that libc has no function for; arguments as ctypes takes them."""
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        _raise_errno()
    return result


def set_process_name(name: str) -> None:
    """What ps and /proc/PID/comm call this process; 15 bytes at most (PR_SET_NAME)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def mount(source: str, target: str, fs_type: str, flags: int, data: str) -> None:
    """mount(2)."""
    if _libc.mount(
        os.fsencode(source), os.fsencode(target), fs_type.encode(), flags, os.fsencode(data)
    ):
        _raise_errno(target)


def clone_mount(path: str) -> int:
    """A private mount of the filesystem that is mounted at `path`, as an O_PATH descriptor of its
    root (open_tree(2), Linux 5.2); it is nowhere in the tree, and gone with its last descriptor.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    fd: int = _libc.syscall(
        _SYS_OPEN_TREE,
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
    )
    if fd < 0:
        _raise_errno(path)
    return fd


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def leave_mount_namespace() -> None:
    """Get mounts of one's own: what is mounted here is seen by no other process, what others
    mount or unmount later is seen here (unshare(2), mount_namespaces(7)).

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    if _libc.unshare(_CLONE_NEWNS):
        _raise_errno()
    mount("none", "/", "", MS_REC | MS_SLAVE, "")


def set_mount_read_only(mount: int | str, *, read_only: bool, below: bool = False) -> None:
    """Make one mount read-only or writable; others of the same filesystem stay as they are
    (mount_setattr(2), Linux 5.12).

    Args:
        mount: a descriptor of its root, or its path.
        below: all mounts beneath it, too.
    """
    bits = _MOUNT_ATTR_RDONLY
    attr = _MountAttr(bits if read_only else 0, 0 if read_only else bits, 0, 0)
    fd, path = (mount, "") if isinstance(mount, int) else (_AT_FDCWD, mount)
    failed = _libc.syscall(
        _SYS_MOUNT_SETATTR,
        ctypes.c_int(fd),
        os.fsencode(path),
        ctypes.c_uint((0 if path else _AT_EMPTY_PATH) | (_AT_RECURSIVE if below else 0)),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    if failed:
        _raise_errno(path or None)


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        _raise_errno(target)


def fill_zero(address: int, size_bytes: int) -> None:
    """Overwrite a range with zeros. ctypes calls memset itself: nothing can optimise it away."""
    ctypes.memset(address, 0, size_bytes)


def copy(target: int, source: int, size_bytes: int) -> None:
    """Copy between two addresses that do not overlap."""
    ctypes.memmove(target, source, size_bytes)


def view(address: int, size_bytes: int) -> memoryview:
    """A writable view of a range. It does not keep the range mapped."""
    return memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")


def filesystem_magic(fd: int) -> int:
    """f_type of the filesystem that an open file lies on (statfs(2), linux/magic.h)."""
    buffer = (ctypes.c_long * 64)()
    if _libc.fstatfs(ctypes.c_int(fd), ctypes.byref(buffer)):
        _raise_errno()
    return buffer[0] & 0xFFFFFFFF
