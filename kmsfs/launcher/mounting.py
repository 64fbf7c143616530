"""Mounting: FUSE where it can be used, else a ramfs, and what was at the mountpoint before."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kmsfs.admin import control
from kmsfs.decryptor import wire
from kmsfs.errors import ControlUnavailable, FuseUnavailable, MountFailed, MountpointUnusable
from kmsfs.settings import MountConfig
from kmsfs.views import mountpoint as mounts
from kmsfs.views import ram_mount, ram_tree
from kmsfs.views.mountpoint import Mount
from kmsfs.views.serving import HeldFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedMount:
    """A mount to be served.

    Attributes:
        config: the view is decided.
        fd: /dev/fuse, or the root of the ramfs; the owner closes it.
        made: whether kmsfs mounted it, and so unmounts it.
        fresh: whether it was not there before.
    """

    config: MountConfig
    fd: int
    mount: Mount
    made: bool
    fresh: bool


def open_mount(config: MountConfig, tell: Callable[[wire.Told], None]) -> OpenedMount:
    """Mount in the view that is configured, or in the one that `auto` comes to.

    Raises:
        FuseUnavailable: the view is `fuse`, and there is none.
        MountFailed, MountpointUnusable, GuaranteeNotMet: it cannot be mounted.
    """
    if config.view == "fuse":
        return _open_fuse(config.served_as("fuse"))
    if config.view == "auto":
        try:
            return _open_fuse(config.served_as("fuse"))
        except FuseUnavailable as error:
            reason = error.detail
        log.warning("FUSE cannot be used (%s): the files are copied into a ramfs", reason)
        tell(wire.ViewChosen(view="ramfs", reason=reason))
        return _open_ram(config.served_as("ramfs", reason))
    return _open_ram(config.served_as("ramfs", config.view_reason))


def unmount_ours(opened: OpenedMount) -> None:
    """Unmount what kmsfs mounted, if it still is what is seen there; lazily if it is in use."""
    mountpoint = opened.mount.mountpoint
    current = mounts.find_mount(mountpoint)
    if not opened.made or current is None or current.mount_id != opened.mount.mount_id:
        return
    try:
        mounts.unmount(mountpoint)
    except OSError as error:
        if error.errno != errno.EBUSY:
            log.warning("unmounting %s: %s", mountpoint, error.strerror)
        with contextlib.suppress(OSError):
            mounts.unmount(mountpoint, lazy=True)


def _open_fuse(config: MountConfig) -> OpenedMount:
    mounts.check_fuse()
    _make_way_for_fuse(config.mountpoint)
    fd = mounts.mount_fuse(config.source, config.mountpoint, allow_other=config.allow_other)
    mount = mounts.find_mount(config.mountpoint)
    if mount is None or mount.fs_type != mounts.FS_TYPE:
        os.close(fd)
        raise MountFailed(f"{config.mountpoint} is not in the mount table")
    return OpenedMount(config, fd, mount, made=True, fresh=True)


def _open_ram(config: MountConfig) -> OpenedMount:
    existing = ram_mount.fillable_mount(config.mountpoint, config.ram)
    if existing is not None:
        _refuse_if_attended(existing)
    opened = ram_mount.open_ram(
        config.source, config.mountpoint, config.ram, size_bytes=config.cache.max_bytes
    )
    try:
        if opened.made:
            ram_mount.make_visible_read_only(config.mountpoint)
    except MountFailed:
        os.close(opened.fd)
        raise
    return OpenedMount(config, opened.fd, opened.mount, opened.made, fresh=existing is None)


def _make_way_for_fuse(mountpoint: str) -> None:
    """Take away what a killed process left at the mountpoint.

    Raises:
        MountpointUnusable: a live process serves it, or nothing can be mounted there.
    """
    existing = mounts.find_mount(mountpoint)
    if existing is not None and mounts.is_ram_of_ours(existing):
        _refuse_if_attended(existing)
        take_away_ram(existing, lazy=True)
    mounts.prepare(mountpoint)


def take_away_ram(mount: Mount, *, lazy: bool = False) -> list[HeldFile]:
    """Unmount a ramfs that no process fills any more, and wipe what nobody holds.

    One that somebody prepared for kmsfs is emptied and stays mounted. In the main thread.

    Returns: what programs still hold.
    Raises:
        MountpointUnusable: a process fills it.
        OSError: it cannot be unmounted; EBUSY while programs use it and `lazy` is false.
    """
    ram_tree.ignore_lease_breaks()
    with ram_mount.left_behind(mount) as tree:
        if mounts.is_ours(mount):
            mounts.unmount(mount.mountpoint, lazy=lazy)
        tree.empty()
        time.sleep(ram_tree.OPENING_S)
        return tree.wipe_old()


def _refuse_if_attended(existing: Mount) -> None:
    with contextlib.suppress(ControlUnavailable):
        control.connect(existing.device, os.geteuid()).close()
        raise MountpointUnusable(
            f"{existing.mountpoint} has {existing.source} mounted already",
            hint=f"kmsfs umount {existing.mountpoint}",
        )
