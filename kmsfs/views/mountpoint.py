"""The mount table, mounting, unmounting, and mounts left dead by a killed daemon."""

import array
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kmsfs import libc
from kmsfs.errors import FuseUnavailable, MountFailed, MountpointUnusable

FS_TYPE: Final = "fuse.kmsfs"

RAM_SOURCE_PREFIX: Final = "kmsfs:"
"""What the source of a ramfs of ours begins with in the mount table."""

# What opening /dev/fuse and mounting say where FUSE cannot be used at all: there is no device or
# no driver behind it, or it is not for us. Whatever else they say is a fault, to be told.
_NO_DEVICE: Final = frozenset({errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM})
_NO_FILESYSTEM: Final = frozenset({errno.ENODEV, errno.EPERM})

_MOUNT_FLAGS: Final = libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC

_OCTAL_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table.

    Attributes:
        device: `major:minor`, one per mounted filesystem.
        super_options: the filesystem's own options, as against those of this mount.
    """

    mount_id: int
    device: str
    mountpoint: str
    fs_type: str
    source: str
    super_options: frozenset[str] = frozenset()

    @property
    def device_number(self) -> int:
        """As st_dev has it."""
        major, minor = self.device.split(":")
        return os.makedev(int(major), int(minor))


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy, and by what."""

    pid: int
    name: str
    by: str


def mount_table() -> list[Mount]:
    """All mounts of this namespace, in the order they were made."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields, (fs_type, source, options) = before.split(" "), after.rstrip("\n").split(" ")
            mounts.append(
                Mount(
                    int(fields[0]),
                    fields[2],
                    _unescape(fields[4]),
                    fs_type,
                    _unescape(source),
                    frozenset(options.split(",")),
                )
            )
    return mounts


def is_ours(mount: Mount) -> bool:
    """Whether kmsfs made a mount. A ramfs that somebody else made for it does not count."""
    return mount.fs_type == FS_TYPE or is_ram_of_ours(mount)


def is_ram_of_ours(mount: Mount) -> bool:
    """Whether a mount is a ramfs or tmpfs that kmsfs made."""
    return mount.fs_type in ("ramfs", "tmpfs") and mount.source.startswith(RAM_SOURCE_PREFIX)


def kmsfs_mounts() -> list[Mount]:
    """All mounts of ours in this namespace."""
    return [mount for mount in mount_table() if is_ours(mount)]


def find_mount(mountpoint: str) -> Mount | None:
    """The topmost mount at a path, of any type; never touches the path itself."""
    found = None
    for mount in mount_table():
        if mount.mountpoint == mountpoint:
            found = mount
    return found


def resolve(mountpoint: str) -> str:
    """Absolute path without symbolic links, without looking into a mount that may be dead."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    return os.path.join(os.path.realpath(parent), name) if name else "/"


def is_dead(mountpoint: str) -> bool:
    """Whether the daemon behind a mount is gone.

    statfs is never answered from the kernel's cache, as a stat of the root may be.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def prepare(mountpoint: str) -> None:
    """Make sure that something can be mounted here; unmount a dead FUSE mount of ours.

    Raises:
        MountpointUnusable: missing, no directory, not empty, mounted on already.
    """
    while (existing := find_mount(mountpoint)) is not None and existing.fs_type == FS_TYPE:
        if not is_dead(mountpoint):
            raise MountpointUnusable(
                f"{mountpoint} has {existing.source} mounted already",
                hint=f"kmsfs umount {mountpoint}",
            )
        unmount(mountpoint, lazy=True)
    try:
        info = os.lstat(mountpoint)
    except FileNotFoundError:
        raise MountpointUnusable(
            f"{mountpoint} does not exist", hint=f"mkdir -p {mountpoint}"
        ) from None
    except OSError as error:
        raise MountpointUnusable(f"{mountpoint}: {error.strerror}") from error
    if stat.S_ISLNK(info.st_mode):
        raise MountpointUnusable(
            f"{mountpoint} is a symbolic link", hint="give the directory that it leads to"
        )
    if not stat.S_ISDIR(info.st_mode):
        raise MountpointUnusable(f"{mountpoint} is not a directory")
    try:
        is_empty = not os.listdir(mountpoint)
    except OSError as error:
        raise MountpointUnusable(f"{mountpoint}: {error.strerror}") from error
    if not is_empty:
        raise MountpointUnusable(
            f"{mountpoint} is not empty, and mounting would hide what is in it",
            hint="give an empty directory",
        )


def check_fuse() -> None:
    """Find out whether FUSE can be used, before anything is changed.

    Raises:
        FuseUnavailable: it cannot.
        MountFailed: opening /dev/fuse failed in another way.
    """
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise FuseUnavailable("fusermount3 is not installed", hint="apt-get install fuse3")
    os.close(_open_device())


def _open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        failed = FuseUnavailable if error.errno in _NO_DEVICE else MountFailed
        raise failed(f"/dev/fuse: {error.strerror}") from error


def mount_fuse(source: str, mountpoint: str, *, allow_other: bool) -> int:
    """Mount and return the descriptor of /dev/fuse that serves the mount.

    Root calls mount(2); others have fusermount3 do it.

    Raises:
        FuseUnavailable: the kernel has no FUSE, or does not let us mount.
        MountFailed.
    """
    if os.geteuid() == 0:
        return _mount_as_root(source, mountpoint, allow_other=allow_other)
    return _mount_as_user(source, mountpoint, allow_other=allow_other)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount the topmost mount at a path.

    Raises:
        OSError: EBUSY while somebody uses it and `lazy` is false; others as umount(2) has them.
    """
    if os.geteuid() == 0:
        flags = libc.UMOUNT_NOFOLLOW | (libc.MNT_DETACH if lazy else 0)
        libc.umount2(mountpoint, flags)
        return
    options = ["-u", "-z"] if lazy else ["-u"]
    if _run_fusermount([*options, "--", mountpoint], {}) != 0:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mountpoint)


def holders(mount: Mount) -> list[Holder]:
    """Processes with a descriptor, directory or map on a mount, as far as we may look.

    Never touches the mount: only what the kernel shows of each process is read.
    """
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            by = _held_by(entry.path, mount)
            if by is not None:
                with contextlib.suppress(OSError), open(entry.path + "/comm") as file:
                    found.append(Holder(int(entry.name), file.read().strip(), by))
    return found


def holders_of(paths: list[str]) -> list[Holder]:
    """Processes that have a file open or mapped whose path ends in one of these."""
    endings = tuple("/" + path for path in paths)
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            by = _holds_path(entry.path, endings)
            if by is not None:
                with contextlib.suppress(OSError), open(entry.path + "/comm") as file:
                    found.append(Holder(int(entry.name), file.read().strip(), by))
    return found


def _holds_path(process: str, endings: tuple[str, ...]) -> str | None:
    with contextlib.suppress(OSError):
        for number in os.listdir(process + "/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{process}/fd/{number}")
                if target.endswith(endings):
                    return f"with {target} open"
    with contextlib.suppress(OSError), open(process + "/maps", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].endswith(endings):
                return f"with {fields[5]} mapped"
    return None


def _held_by(process: str, mount: Mount) -> str | None:
    for link, what in (("cwd", "as its working directory"), ("root", "as its root directory")):
        with contextlib.suppress(OSError):
            target = os.readlink(f"{process}/{link}")
            if _is_below(target, mount.mountpoint):
                return what
    with contextlib.suppress(OSError):
        for number in os.listdir(process + "/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{process}/fd/{number}")
                if _is_below(target, mount.mountpoint):
                    return f"with {target} open"
    with contextlib.suppress(OSError), open(process + "/maps", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and _map_device(fields[3]) == mount.device_number:
                return f"with {fields[5].strip()} mapped"
    return None


def _map_device(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major, 16), int(minor, 16))


def _is_below(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint + "/")


def _mount_as_root(source: str, mountpoint: str, *, allow_other: bool) -> int:
    fd = _open_device()
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    options += ",default_permissions" + (",allow_other" if allow_other else "")
    try:
        libc.mount(source, mountpoint, FS_TYPE, _MOUNT_FLAGS, options)
    except OSError as error:
        os.close(fd)
        failed = FuseUnavailable if error.errno in _NO_FILESYSTEM else MountFailed
        raise failed(f"mounting FUSE at {mountpoint}: {error.strerror}") from error
    return fd


def _mount_as_user(source: str, mountpoint: str, *, allow_other: bool) -> int:
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"ro,nosuid,nodev,noexec,default_permissions,subtype=kmsfs,fsname={escaped}"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            status = _run_fusermount(
                ["-o", options, "--", mountpoint], {"_FUSE_COMMFD": str(theirs.fileno())}
            )
        if status != 0:
            raise MountFailed(
                f"fusermount3 could not mount at {mountpoint}",
                hint="its own message is above; allow_other needs user_allow_other in "
                "/etc/fuse.conf",
            )
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[:4])
    if not fds:
        raise MountFailed("fusermount3 gave no descriptor")
    return fds[0]


def _run_fusermount(arguments: list[str], environment: dict[str, str]) -> int:
    program = shutil.which("fusermount3")
    if program is None:
        raise FuseUnavailable("fusermount3 is not installed", hint="apt-get install fuse3")
    pid = os.posix_spawn(
        program, [program, *arguments], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment}
    )
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _unescape(text: str) -> str:
    """Spaces and the like are octal escapes in the mount table."""

    def character(found: re.Match[str]) -> str:
        return chr(int(found[1], 8))

    return _OCTAL_ESCAPE.sub(character, text)


def watch_mount_table() -> int:
    """A descriptor that polls POLLPRI whenever the mount table of this namespace changes."""
    return os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)


def mounts_of(device: str) -> Iterator[Mount]:
    """Everywhere one filesystem is mounted in this namespace, bind mounts included."""
    return (mount for mount in mount_table() if mount.device == device)
