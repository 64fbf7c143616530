"""The filesystem that the ramfs view fills: mounted, and verified to be what it must be.

kmsfs writes through a private mount of the filesystem, which nobody else sees; the one that
programs see is read-only. So an unmount never waits for kmsfs, and what is left can still be
wiped after it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kmsfs import libc
from kmsfs.errors import GuaranteeNotMet, MountFailed
from kmsfs.settings import RamSettings
from kmsfs.views import mountpoint as mounts
from kmsfs.views.mountpoint import Mount
from kmsfs.views.ram_tree import RamTree

# linux/magic.h
_MAGIC: Final = {"ramfs": 0x858458F6, "tmpfs": 0x01021994}
_KINDS: Final = {number: kind for kind, number in _MAGIC.items()}

_FLAGS: Final = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
_WANTED_FLAGS: Final = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}


@dataclass(frozen=True, slots=True)
class RamMount:
    """A filesystem to fill.

    Attributes:
        fd: a descriptor of its root through which it can be written; the owner closes it.
        mount: where programs see it.
        made: whether kmsfs mounted it, now or earlier; what others made, others unmount.
    """

    fd: int
    mount: Mount
    made: bool


def fillable_mount(mountpoint: str, ram: RamSettings) -> Mount | None:
    """The filesystem at a mountpoint that would be filled in place: one of ours that a killed
    process left, or one of the wanted kind that somebody prepared."""
    existing = mounts.find_mount(mountpoint)
    if existing is None:
        return None
    return existing if mounts.is_ours(existing) or existing.fs_type == ram.kind else None


def open_ram(source: str, mountpoint: str, ram: RamSettings, *, size_bytes: int) -> RamMount:
    """Mount a filesystem for plaintext, or take the one that is there; it is verified.

    Args:
        source: what the mount table is to show.
        size_bytes: limit of a tmpfs; a ramfs has none.

    Raises:
        MountFailed: the kernel refuses.
        MountpointUnusable: missing, not empty, a mount of another kind of ours.
        GuaranteeNotMet: see `verify`.
    """
    existing = fillable_mount(mountpoint, ram)
    made = existing is None or mounts.is_ours(existing)
    if existing is None:
        mounts.prepare(mountpoint)
        _mount(source, mountpoint, ram, size_bytes)
    try:
        mount = mounts.find_mount(mountpoint)
        if mount is None:
            raise MountFailed(f"{mountpoint} is not in the mount table")
        fd = open_for_writing(mount)
        try:
            verify(fd, mountpoint, ram)
        except BaseException:
            os.close(fd)
            raise
        return RamMount(fd, mount, made)
    except BaseException:
        if existing is None:
            with contextlib.suppress(OSError):
                mounts.unmount(mountpoint)
        raise


def open_for_writing(mount: Mount) -> int:
    """A descriptor of the root of a ramfs or tmpfs, on a writable mount that nobody else sees.

    Where this process may not make one (in a container), it is the mount itself.

    Raises:
        MountFailed: neither.
    """
    try:
        try:
            fd = libc.clone_mount(mount.mountpoint)
        except PermissionError:
            return os.open(mount.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            libc.set_mount_read_only(fd, read_only=False)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise MountFailed(f"{mount.mountpoint}: {error.strerror}") from error
    return fd


def verify(fd: int, mountpoint: str, ram: RamSettings) -> None:
    """Make sure that what is written below `fd` stays in memory that cannot be swapped.

    Raises:
        GuaranteeNotMet: another filesystem, a swappable one, or one on which programs, devices
            or set-user-ID files would work.
    """
    kind = _KINDS.get(libc.filesystem_magic(fd), "another filesystem")
    if kind != ram.kind:
        hint = "add --ram tmpfs to use a tmpfs" if kind == "tmpfs" else None
        raise GuaranteeNotMet(f"{mountpoint} is on {kind}, not on a {ram.kind}", hint=hint)
    flags = os.fstatvfs(fd).f_flag
    missing = [name for name, flag in _WANTED_FLAGS.items() if not flags & flag]
    if missing:
        options = ",".join(missing)
        raise GuaranteeNotMet(
            f"{mountpoint} is not mounted {options}",
            hint=f"mount -o remount,{options} {mountpoint}",
        )
    if kind == "tmpfs" and not ram.allow_swap and not _never_swaps(fd):
        raise GuaranteeNotMet(
            f"the tmpfs at {mountpoint} can be swapped out",
            hint="mount it with noswap (Linux 6.4), or add --allow-swap",
        )


def verify_visible(fd: int, mountpoint: str) -> None:
    """Make sure that programs which look at `mountpoint` see the filesystem of `fd`.

    Raises:
        GuaranteeNotMet: something else is mounted there, or nothing.
    """
    mount = mounts.find_mount(mountpoint)
    if mount is None or mount.device_number != os.fstat(fd).st_dev:
        what = "nothing" if mount is None else f"another filesystem ({mount.fs_type})"
        raise GuaranteeNotMet(f"{what} is mounted at {mountpoint} now")


def is_swappable(fd: int) -> bool:
    """Whether the kernel may write what lies below `fd` to swap."""
    return _KINDS.get(libc.filesystem_magic(fd)) != "ramfs" and not _never_swaps(fd)


def make_visible_read_only(mountpoint: str) -> None:
    """Let nobody write through the mount that programs see.

    Raises:
        MountFailed.
    """
    try:
        libc.set_mount_read_only(mountpoint, read_only=True)
    except OSError as error:
        raise MountFailed(f"making {mountpoint} read-only: {error.strerror}") from error


@contextlib.contextmanager
def left_behind(mount: Mount) -> Iterator[RamTree]:
    """The files of a ramfs that no process fills any more, to be taken away.

    Raises:
        MountpointUnusable: a process does fill it.
        MountFailed.
    """
    fd = open_for_writing(mount)
    try:
        tree = RamTree(fd)
        try:
            yield tree
        finally:
            tree.close()
    finally:
        os.close(fd)


def _mount(source: str, mountpoint: str, ram: RamSettings, size_bytes: int) -> None:
    options = "mode=0700"
    if ram.kind == "tmpfs":
        # Pages of the limit are those of the files; directories take some more.
        options += f",size={2 * size_bytes}" + ("" if ram.allow_swap else ",noswap")
    try:
        libc.mount(mounts.RAM_SOURCE_PREFIX + source, mountpoint, ram.kind, _FLAGS, options)
    except OSError as error:
        if ram.kind == "tmpfs" and error.errno == errno.EINVAL:
            raise GuaranteeNotMet(
                "this kernel has no tmpfs that never swaps (Linux 6.4)",
                hint="use a ramfs, or add --allow-swap",
            ) from error
        hint = "mount as root, or prepare a ramfs there" if error.errno == errno.EPERM else None
        raise MountFailed(
            f"mounting a {ram.kind} at {mountpoint}: {error.strerror}", hint=hint
        ) from error


def _never_swaps(fd: int) -> bool:
    device = os.fstat(fd).st_dev
    return any(
        "noswap" in mount.super_options
        for mount in mounts.mount_table()
        if mount.device_number == device
    )
