"""What lies in the ramfs: generations of files, published by one rename, wiped when nobody reads.

The layout is that of Kubernetes' atomic writer, which programs that watch files know::

    ssl.pem -> ..data/ssl.pem
    ..data -> ..2026_11_24_10_00_00.5f0c9a1e
    ..2026_11_24_10_00_00.5f0c9a1e/ssl.pem
    ..old/                                    files that are to be wiped; 0700

A generation is filled in a directory that nobody else can enter, linking what has not changed,
and becomes current when `..data` is replaced. A file that is in no generation any more moves to
`..old`, where it has no name that a reader could open it by, and is overwritten there once the
kernel says that nobody holds it: a write lease is granted on a file that no other descriptor and
no map refers to (fcntl(2), F_SETLEASE). So no reader ever sees zeros, and what a killed process
left is found again.

A source serves no name at its top that begins with two dots, so the layout's own are free.

Everything here is synchronous and does not wait for anybody. Plaintext is written by the caller,
into descriptors made here.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import signal
import stat
import time
from collections.abc import Iterator
from typing import Final

from kmsfs.errors import MountpointUnusable
from kmsfs.store.policy import Permissions
from kmsfs.views.serving import HeldFile

OPENING_S: Final = 0.1
"""Between taking a file's name away and overwriting it: whoever was just opening it is done then.
"""

_CURRENT: Final = "..data"
_NEXT: Final = "..data_next"
_OLD: Final = "..old"
_STATE: Final = "..state"

_GENERATION_NAME: Final = re.compile(r"\.\.\d{4}(_\d\d){5}\.[0-9a-f]{8}")

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Mode of a directory while it is filled or emptied.
_PRIVATE: Final = 0o700

_ZEROS: Final = bytes(1 << 20)
_MAX_STATE_BYTES: Final = 64 << 20


def ignore_lease_breaks() -> None:
    """Let whoever opens a file just as it is wiped wait, without a signal to this process.

    Must be called in the main thread before anything is wiped: SIGIO would end the process.
    """
    signal.signal(signal.SIGIO, signal.SIG_IGN)


class Generation:
    """A set of files that is being filled. Nobody else can enter it before it is published."""

    def __init__(self, root_fd: int, name: str) -> None:
        os.mkdir(name, _PRIVATE, dir_fd=root_fd)
        self.name: Final = name
        self.fd: Final = os.open(name, _DIRECTORY, dir_fd=root_fd)
        self._directories = {""}

    def make_directory(self, path: str) -> None:
        """Make a directory and those above it; again is harmless."""
        if path in self._directories:
            return
        self.make_directory(path.rpartition("/")[0])
        os.mkdir(path, _PRIVATE, dir_fd=self.fd)
        self._directories.add(path)

    def create(self, path: str, permissions: Permissions) -> int:
        """A new file's descriptor: it is owned already, and nobody may open it yet (0000)."""
        self.make_directory(path.rpartition("/")[0])
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0, dir_fd=self.fd)
        try:
            _own(fd, permissions.uid, permissions.gid)
        except OSError:
            os.close(fd)
            raise
        return fd

    def finish(self, fd: int, permissions: Permissions, mtime_ns: int) -> None:
        """Open up a file that is complete. The descriptor stays the caller's."""
        os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.fchmod(fd, permissions.mode)

    def link(self, path: str, other_fd: int) -> None:
        """Take a file over from another generation: the same inode, without a copy."""
        self.make_directory(path.rpartition("/")[0])
        os.link(path, path, src_dir_fd=other_fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def take_out(self, path: str) -> None:
        """Remove a file again, wiped."""
        if not _wipe_if_free(self.fd, path):
            os.unlink(path, dir_fd=self.fd)

    def seal(self, directories: Permissions, state: bytes) -> None:
        """Write the state beside the files, and give every directory its owner and mode."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(_STATE, flags, 0o600, dir_fd=self.fd)
        with open(fd, "wb") as file:
            file.write(state)
        for path in sorted(self._directories, reverse=True):
            fd = os.open(path or ".", _DIRECTORY, dir_fd=self.fd)
            try:
                _own(fd, directories.uid, directories.gid)
                os.fchmod(fd, directories.mode)
            finally:
                os.close(fd)

    def names(self) -> set[str]:
        """What lies at its top, the state excepted."""
        return set(os.listdir(self.fd)) - {_STATE}

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


class RamTree:
    """The files in one ramfs.

    Args:
        mount_fd: any descriptor of its root, writable as a mount; stays the caller's.

    Raises:
        MountpointUnusable: another process fills it, or it holds files of somebody else's.
    """

    def __init__(self, mount_fd: int) -> None:
        self._root_fd = os.open(".", _DIRECTORY, dir_fd=mount_fd)
        try:
            # Held for as long as this process lives, and gone with it however it ends.
            fcntl.flock(self._root_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._refuse_foreign_files()
        except BlockingIOError:
            self.close()
            raise MountpointUnusable(
                "another process of kmsfs fills this ramfs", hint="kmsfs umount MOUNTPOINT"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process fill it. The files stay; again is harmless."""
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1

    # --- generations ---------------------------------------------------------------------------

    def begin(self) -> Generation:
        """A new, empty generation."""
        name = time.strftime("..%Y_%m_%d_%H_%M_%S.", time.gmtime()) + secrets.token_hex(4)
        return Generation(self._root_fd, name)

    def publish(self, generation: Generation, directories: Permissions, state: bytes) -> None:
        """Make a generation the current one, in one step; the one before stays for now.

        Args:
            directories: owner and mode of the root and of every directory.
            state: for whoever takes the files over after a crash; see `adopt`.
        """
        generation.seal(directories, state)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_NEXT, dir_fd=self._root_fd)
        os.symlink(generation.name, _NEXT, dir_fd=self._root_fd)
        os.rename(_NEXT, _CURRENT, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
        wanted, present = generation.names(), set(self._links())
        for name in sorted(wanted - present):
            os.symlink(f"{_CURRENT}/{name}", name, dir_fd=self._root_fd)
        for name in present - wanted:
            os.unlink(name, dir_fd=self._root_fd)
        _own(self._root_fd, directories.uid, directories.gid)
        # Others than root have to be able to replace what lies here.
        needed = 0 if os.geteuid() == 0 else stat.S_IWUSR
        os.fchmod(self._root_fd, directories.mode | needed)

    def open_current(self) -> int | None:
        """A descriptor of the current generation, the caller's to close; None without one."""
        name = self._current_name()
        if name is None:
            return None
        try:
            return os.open(name, _DIRECTORY, dir_fd=self._root_fd)
        except OSError:
            return None

    def read_state(self) -> bytes | None:
        """What was written as the current generation's state; None if there is none."""
        current_fd = self.open_current()
        if current_fd is None:
            return None
        try:
            fd = os.open(_STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current_fd)
            with open(fd, "rb") as file:
                return file.read(_MAX_STATE_BYTES)
        except OSError:
            return None
        finally:
            os.close(current_fd)

    def has_older(self) -> bool:
        """Whether `retire` or `wipe_old` has something to do."""
        return len(self._generations()) > 1 or _OLD in os.listdir(self._root_fd)

    # --- the end of files ----------------------------------------------------------------------

    def discard(self, generation: Generation) -> None:
        """Take a generation apart that was not published; see `retire`."""
        generation.close()
        self._take_apart(generation.name)

    def retire(self, *, current_too: bool = False) -> None:
        """Take apart every generation but the current one; what is in no other goes to `..old`.

        Nothing is wiped yet: a program may just be opening one of these files.
        """
        keep = None if current_too else self._current_name()
        for name in self._generations():
            if name != keep:
                self._take_apart(name)

    def empty(self) -> None:
        """Take everything away that has a name; `wipe_old` does the rest."""
        for name in (*self._links(), _CURRENT, _NEXT):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._root_fd)
        self.retire(current_too=True)

    def wipe_old(self) -> list[HeldFile]:
        """Overwrite and remove the files in `..old` that nobody holds.

        Returns: those that somebody does; they are tried again the next time.
        """
        held = []
        for directory_fd, old_path, names in self._old_files():
            for name in names:
                if not _wipe_if_free(directory_fd, name):
                    path = f"{old_path}/{name}"
                    held.append(HeldFile(path.split("/", 2)[2], path))
        self._remove_empty(_OLD)
        return held

    def _take_apart(self, name: str) -> None:
        place = f"{_OLD}/{name}"
        for path, directory_fd, directories, files in _walk(name, self._root_fd):
            if os.geteuid() != 0:
                os.fchmod(directory_fd, _PRIVATE)
            for file in files:
                is_state = path == name and file == _STATE
                if is_state or _links_of(directory_fd, file) > 1:
                    os.unlink(file, dir_fd=directory_fd)
                    continue
                target = f"{_OLD}/{path}"
                self._make_directories(target)
                os.rename(
                    file, f"{target}/{file}", src_dir_fd=directory_fd, dst_dir_fd=self._root_fd
                )
            for directory in directories:
                os.rmdir(directory, dir_fd=directory_fd)
        os.rmdir(name, dir_fd=self._root_fd)
        self._remove_empty(place)

    def _make_directories(self, path: str) -> None:
        try:
            os.mkdir(path, _PRIVATE, dir_fd=self._root_fd)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_directories(path.rpartition("/")[0])
            os.mkdir(path, _PRIVATE, dir_fd=self._root_fd)

    def _old_files(self) -> Iterator[tuple[int, str, list[str]]]:
        for path, directory_fd, _, files in _walk(_OLD, self._root_fd):
            yield directory_fd, path, files

    def _remove_empty(self, place: str) -> None:
        for _, directory_fd, directories, _ in _walk(place, self._root_fd):
            for name in directories:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=directory_fd)
        with contextlib.suppress(OSError):
            os.rmdir(place, dir_fd=self._root_fd)

    # --- what is there -------------------------------------------------------------------------

    def _current_name(self) -> str | None:
        try:
            name = os.readlink(_CURRENT, dir_fd=self._root_fd)
        except OSError:
            return None
        return name if _GENERATION_NAME.fullmatch(name) else None

    def _generations(self) -> list[str]:
        return [name for name in os.listdir(self._root_fd) if _GENERATION_NAME.fullmatch(name)]

    def _links(self) -> Iterator[str]:
        for name in os.listdir(self._root_fd):
            with contextlib.suppress(OSError):
                if os.readlink(name, dir_fd=self._root_fd) == f"{_CURRENT}/{name}":
                    yield name

    def _refuse_foreign_files(self) -> None:
        own = {_CURRENT, _NEXT, _OLD, *self._links(), *self._generations()}
        foreign = sorted(set(os.listdir(self._root_fd)) - own)
        if foreign:
            raise MountpointUnusable(
                f"the ramfs holds files that are not of kmsfs: {', '.join(foreign[:5])}",
                hint="give an empty one",
            )


def _walk(path: str, root_fd: int) -> Iterator[tuple[str, int, list[str], list[str]]]:
    """Deepest first: path, descriptor, directories and other files of a tree below `root_fd`."""
    try:
        fd = os.open(path, _DIRECTORY, dir_fd=root_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        raise
    try:
        directories: list[str] = []
        files: list[str] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                (directories if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
        for name in directories:
            yield from _walk(f"{path}/{name}", root_fd)
        yield path, fd, directories, files
    finally:
        os.close(fd)


def _links_of(directory_fd: int, name: str) -> int:
    return os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_nlink


def _wipe_if_free(directory_fd: int, name: str) -> bool:
    """Overwrite and remove a file, unless somebody else has it open or mapped.

    What is in the way of asking (a filesystem without leases) counts as somebody.
    """
    if os.geteuid() != 0:
        os.chmod(name, 0o600, dir_fd=directory_fd)
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return False
        overwrite(fd)
        os.unlink(name, dir_fd=directory_fd)
    finally:
        # Gives the lease back as well.
        os.close(fd)
    return True


def overwrite(fd: int) -> None:
    """Write zeros over a file in place, then cut it to nothing."""
    size_bytes = os.fstat(fd).st_size
    offset = 0
    while offset < size_bytes:
        offset += os.pwrite(fd, _ZEROS[: size_bytes - offset], offset)
    os.ftruncate(fd, 0)


def _own(fd: int, uid: int, gid: int) -> None:
    info = os.fstat(fd)
    if (info.st_uid, info.st_gid) != (uid, gid):
        os.fchown(fd, uid, gid)
