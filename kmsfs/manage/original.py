"""A file that is to be replaced: what it was like when it was read, and that it still is."""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kmsfs.errors import CiphertextChanging, InputUnreadable

# What filesystems answer that have no extended attributes.
_NO_XATTRS: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(frozen=True, slots=True)
class Original:
    """A regular file, read whole: its content, attributes and identity."""

    path: Path
    content: bytes = field(repr=False)
    info: os.stat_result = field(repr=False)
    xattrs: dict[str, bytes] = field(repr=False)

    def give_attributes(self, fd: int) -> None:
        """Give a new file this one's owner, permissions and extended attributes.

        Raises:
            OSError: this process may not.
        """
        here = os.fstat(fd)
        if (here.st_uid, here.st_gid) != (self.info.st_uid, self.info.st_gid):
            os.fchown(fd, self.info.st_uid, self.info.st_gid)
        os.fchmod(fd, stat.S_IMODE(self.info.st_mode))
        found = _xattrs_of(fd)
        for name, value in self.xattrs.items():
            # A label that every file here gets may not be ours to set.
            if found.get(name) != value:
                os.setxattr(fd, name, value)

    def check_unchanged(self) -> None:
        """Make sure that the file is still the one that was read.

        Raises:
            CiphertextChanging: it was written to, replaced or removed.
        """
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except OSError:
            now = None
        if now is None or _identity(now) != _identity(self.info):
            raise CiphertextChanging(
                "it was changed by somebody else meanwhile",
                hint="nothing was replaced: run the command again",
            )


def read_original(path: Path, *, max_bytes: int) -> Original:
    """Read a file that is to be replaced.

    Raises:
        InputUnreadable: missing, no regular file, too large, or the disk says no.
        CiphertextChanging: it changed while it was read.
    """
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputUnreadable(
                "it is a symbolic link", hint=f"name the file: {os.path.realpath(path)}"
            ) from error
        raise InputUnreadable(error.strerror or type(error).__name__) from error
    try:
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InputUnreadable("it is not a regular file", hint="name files")
            if info.st_size > max_bytes:
                raise InputUnreadable(f"it is larger than {max_bytes} bytes")
            content = file.read(max_bytes + 1)
            original = Original(path, content, info, _xattrs_of(fd))
    except OSError as error:
        raise InputUnreadable(error.strerror or type(error).__name__) from error
    original.check_unchanged()
    return original


def _xattrs_of(fd: int) -> dict[str, bytes]:
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return {}
        raise
    found = {}
    for name in names:
        # Gone meanwhile, or not for this process to read.
        with contextlib.suppress(OSError):
            found[name] = os.getxattr(fd, name)
    return found


def _identity(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
