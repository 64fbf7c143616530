"""Finding mounts of kmsfs, and the programs that hold on to what was in them."""

import os

from kmsfs.admin import control
from kmsfs.cli import messages
from kmsfs.errors import ControlUnavailable, MountpointUnusable
from kmsfs.views import mountpoint as mounts

_MAX_NAMED = 8


def find(mountpoint: str) -> mounts.Mount:
    """The mount of kmsfs at a path.

    Raises:
        MountpointUnusable: there is none.
    """
    path = mounts.resolve(mountpoint)
    found = _ours_at(path)
    if found is None:
        raise MountpointUnusable(f"nothing of kmsfs is mounted at {path}")
    return found


def find_below(path: str) -> tuple[mounts.Mount, str]:
    """The mount of kmsfs that a path lies in, and the path relative to its mountpoint.

    The path itself is not looked at: the mount may be dead, and what is served may have changed.

    Raises:
        MountpointUnusable: it lies in none.
    """
    names = os.path.abspath(path).strip("/").split("/")
    for count in range(len(names) + 1):
        above = mounts.resolve("/" + "/".join(names[:count]))
        mount = _ours_at(above) or _ours_at(os.path.realpath(above))
        if mount is not None:
            below = names[count:]
            if mount.fs_type != mounts.FS_TYPE and below and below[0].startswith(".."):
                # A directory of the ramfs's own layout, which links lead to.
                del below[0]
            return mount, "/".join(below)
    raise MountpointUnusable(f"{path} is in no mount of kmsfs", hint="see `kmsfs status`")


def _ours_at(path: str) -> mounts.Mount | None:
    found = mounts.find_mount(path)
    if found is not None and (mounts.is_ours(found) or _is_attended(found)):
        return found
    return None


def find_all() -> list[mounts.Mount]:
    """Every filesystem that kmsfs mounted or fills, once: where it was mounted first."""
    found: dict[str, mounts.Mount] = {}
    for mount in mounts.mount_table():
        if mount.device not in found and (mounts.is_ours(mount) or _is_attended(mount)):
            found[mount.device] = mount
    return list(found.values())


def _is_attended(mount: mounts.Mount) -> bool:
    """Whether a filesystem that others mounted is filled by a process of kmsfs."""
    if mount.fs_type not in ("ramfs", "tmpfs"):
        return False
    try:
        if not os.path.exists(control.socket_path(mount.device, os.geteuid())):
            return False
        control.connect(mount.device, os.geteuid()).close()
    except ControlUnavailable:
        return False
    return True


def warn_of_stale(mount: mounts.Mount) -> None:
    """Say which programs have files of a locked mount open or mapped: they will see errors."""
    stale = [holder for holder in mounts.holders(mount) if not holder.by.startswith("as its")]
    for holder in stale[:_MAX_NAMED]:
        messages.warning(f"{holder.name} (pid {holder.pid}) cannot read any more: {holder.by}")
    if len(stale) > _MAX_NAMED:
        messages.warning(f"{len(stale) - _MAX_NAMED} other programs cannot read any more")


def warn_of_held(paths: dict[str, str]) -> None:
    """Say which programs hold files that were taken away.

    Args:
        paths: where each lies now, relative to its filesystem, and the path it was served under.
    """
    if not paths:
        return
    holders = mounts.holders_of(list(paths))
    for holder in holders[:_MAX_NAMED]:
        messages.warning(f"{holder.name} (pid {holder.pid}) can still read it: {holder.by}")
    if len(holders) > _MAX_NAMED:
        messages.warning(f"{len(holders) - _MAX_NAMED} other programs can still read files")
    if not holders:
        names = ", ".join(list(paths.values())[:_MAX_NAMED])
        messages.warning(f"somebody whom this user may not see can still read {names}")
    messages.hint("each file is wiped as soon as nobody holds it")
