"""Writing a file whole or not at all.

The content goes into a nameless file of the target's directory, is flushed to disk, and gets
its name in one step; whatever fails before, nothing is left behind. Where nameless files are
not to be had, a file of a random name takes their place.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kmsfs import libc
from kmsfs.errors import OutputExists, OutputUnwritable
from kmsfs.manage.original import Original

FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700

# linux/magic.h
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6

_TEMPORARY_NAME: Final = re.compile(r"\.kmsfs-[0-9a-f]{16}")

# What filesystems answer that have no nameless files; EISDIR comes from kernels before them.
_NO_NAMELESS_FILES: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


def write_file(
    path: Path,
    content: bytes | memoryview,
    *,
    replace: bool,
    mode: int = FILE_MODE,
    like: Original | None = None,
) -> None:
    """Put `content` at `path` atomically and durably.

    Args:
        mode: permissions, whatever the umask.
        like: a file whose owner, permissions and extended attributes the new one gets in place
            of `mode`, and which must not have changed since it was read: mostly the one that is
            replaced.
        replace: whether a regular file that is there already is replaced. Nothing else ever is:
            no directory, device or symbolic link.

    Raises:
        OutputExists: something is there and `replace` is false.
        OutputUnwritable: the directory or the disk says no.
        CiphertextChanging: `like` was changed.
    """
    directory_fd = _open_directory(path.parent)
    try:
        _refuse_existing(directory_fd, path, replace=replace)
        try:
            with _written(directory_fd, content, mode, like) as (fd, temporary_name):
                if like is not None:
                    like.check_unchanged()
                _give_name(directory_fd, fd, temporary_name, path.name, replace=replace)
            os.fsync(directory_fd)
        except FileExistsError:
            raise OutputExists(f"{path} exists already") from None
        except OSError as error:
            raise OutputUnwritable(f"{path}: {error.strerror}") from error
    finally:
        os.close(directory_fd)


def check_output(path: Path, *, replace: bool) -> None:
    """Fail as `write_file` would for what is known beforehand, so that no work is in vain.

    Raises:
        OutputExists, OutputUnwritable: see `write_file`.
    """
    directory_fd = _open_directory(path.parent)
    try:
        _refuse_existing(directory_fd, path, replace=replace)
    finally:
        os.close(directory_fd)


def make_directories(directory: Path) -> None:
    """Make a directory, and those above it that are missing, durably and for the owner alone.

    Raises:
        OutputUnwritable: something else is there, or the disk says no.
    """
    if directory.is_dir():
        return
    make_directories(directory.parent)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, _DIRECTORY_MODE)
    except OSError as error:
        raise OutputUnwritable(f"{directory}: {error.strerror}") from error
    if not directory.is_dir():
        raise OutputUnwritable(f"{directory} exists and is not a directory")
    parent_fd = _open_directory(directory.parent)
    try:
        os.fsync(parent_fd)
    finally:
        os.close(parent_fd)


def remove_file(path: Path) -> None:
    """Remove a file, durably.

    Raises:
        OutputUnwritable: the directory or the disk says no.
    """
    directory_fd = _open_directory(path.parent)
    try:
        os.unlink(path.name, dir_fd=directory_fd)
        os.fsync(directory_fd)
    except OSError as error:
        raise OutputUnwritable(f"{path}: {error.strerror}") from error
    finally:
        os.close(directory_fd)


def lies_on_disk(fd: int) -> bool:
    """Whether what is written to an open file comes to lie in a filesystem on disk."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    return libc.filesystem_magic(fd) not in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def directory_lies_on_disk(directory: Path) -> bool:
    """Whether files of an existing directory lie in a filesystem on disk.

    Raises:
        OutputUnwritable: it cannot be opened.
    """
    fd = _open_directory(directory)
    try:
        return libc.filesystem_magic(fd) not in (_TMPFS_MAGIC, _RAMFS_MAGIC)
    finally:
        os.close(fd)


def _open_directory(directory: Path) -> int:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputUnwritable(f"{directory}: {error.strerror}") from error


def _refuse_existing(directory_fd: int, path: Path, *, replace: bool) -> None:
    try:
        info = os.stat(path.name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputUnwritable(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise OutputUnwritable(f"{path} exists and is not a regular file")
    if not replace:
        raise OutputExists(f"{path} exists already")


@contextlib.contextmanager
def _written(
    directory_fd: int, content: bytes | memoryview, mode: int, like: Original | None
) -> Iterator[tuple[int, str | None]]:
    """A flushed file with the content, and its name if it needs one; gone at the end."""
    name = None
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, FILE_MODE, dir_fd=directory_fd)
    except OSError as error:
        if error.errno not in _NO_NAMELESS_FILES:
            raise
        name = _temporary_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, FILE_MODE, dir_fd=directory_fd)
    try:
        if like is None:
            os.fchmod(fd, mode)
        else:
            like.give_attributes(fd)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
        yield fd, name
    finally:
        os.close(fd)
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory_fd)


def _give_name(
    directory_fd: int, fd: int, temporary_name: str | None, name: str, *, replace: bool
) -> None:
    if temporary_name is None:
        if not replace:
            _link(directory_fd, f"/proc/self/fd/{fd}", name)
            return
        # link(2) replaces nothing, and rename(2) wants a name.
        temporary_name = _temporary_name()
        _link(directory_fd, f"/proc/self/fd/{fd}", temporary_name)
        try:
            _rename(directory_fd, temporary_name, name)
        except OSError:
            os.unlink(temporary_name, dir_fd=directory_fd)
            raise
    elif replace:
        _rename(directory_fd, temporary_name, name)
    else:
        _link(directory_fd, temporary_name, name)


def _link(directory_fd: int, source: str, name: str) -> None:
    os.link(source, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd, follow_symlinks=True)


def _rename(directory_fd: int, source: str, name: str) -> None:
    os.rename(source, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)


def is_temporary_name(name: str) -> bool:
    """Whether a file has a name that one gets here which is about to replace another."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def _temporary_name() -> str:
    return f".kmsfs-{secrets.token_hex(8)}"
