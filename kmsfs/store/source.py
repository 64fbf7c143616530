"""The source tree: names, versions, sizes. Reads ciphertext's outside only; never KMS.

Every path is resolved beneath the source's root (openat2), so that a symbolic link cannot lead
out of it, and opened without blocking, so that a FIFO cannot hold anybody up. All calls are
synchronous disk I/O; on a filesystem that can hang (`is_local` is false) they belong in a thread.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kmsfs import libc
from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.errors import SourceMissing, SourceUnreadable
from kmsfs.formats import kms_blob
from kmsfs.formats.detect import SUFFIXES, Format, served_name
from kmsfs.store.ciphertext import CiphertextFacts, FileVersion, read_facts, version_of
from kmsfs.store.names import ancestors, is_hidden, is_utf8, join

RESOLVE: Final = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS
"""How every path of a source is resolved, whoever opens it."""

_OPEN_TRIES: Final = 16

# linux/magic.h: filesystems whose I/O ends. Others (NFS, CIFS, FUSE) may hang.
_LOCAL_MAGIC: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs
        0x73717368,  # squashfs
        0xF2F52010,  # f2fs
        0x2FC12FC1,  # zfs
    }
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A ciphertext file and what its outside tells.

    Attributes:
        path: served path, relative to the source.
        source_path: path of the ciphertext, relative to the source.
        size_bytes: of the plaintext; an estimate unless `size_exact`.
        key: what counts as one key when calls are limited.
        bound: whether its (not yet verified) encryption context names a place.
        suffix_taken: whether a suffix was taken off its name, which declares it to be ciphertext.
        problem: why it can never be decrypted; empty if nothing is known against it.
        rivals: other ciphertext files that claim the same served name.
    """

    path: str
    source_path: str
    version: FileVersion
    format: Format
    size_bytes: int
    size_exact: bool
    key: str
    bound: bool
    suffix_taken: bool
    problem: str = ""
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceDirectory:
    """A directory of the source, served under its own name."""

    path: str
    mtime_ns: int


SourceNode = SourceFile | SourceDirectory


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything in the source, by what becomes of it. Paths are relative to the source.

    `unreadable` are directories that could not be listed: of what is in them nothing is known.
    """

    files: tuple[SourceFile, ...]
    directories: tuple[str, ...]
    unreadable: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]


OpenForUs = Callable[[str, int], int]
"""Opens a path of the source, given open's flags, for a process that may not. It blocks, and
raises OSError."""


class Source:
    """A directory of ciphertext.

    Args:
        open_for_us: asked for what this process has no permission to open.

    Raises:
        SourceMissing, SourceUnreadable: it cannot be opened.
    """

    def __init__(self, root: str, open_for_us: OpenForUs | None = None) -> None:
        try:
            self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError as error:
            if open_for_us is None:
                raise _translated(error, root) from error
            self._root_fd = open_for_us(".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _translated(error, root) from error
        self.root: Final = root
        self._open_for_us = open_for_us
        on_local_disk = libc.filesystem_magic(self._root_fd) in _LOCAL_MAGIC
        self.is_local: Final = on_local_disk and open_for_us is None
        # By source path. Examinations may run in several threads.
        self._facts: dict[str, CiphertextFacts] = {}
        self._facts_lock = threading.Lock()

    def close(self) -> None:
        """Give the root's descriptor back."""
        os.close(self._root_fd)

    # --- reading the tree --------------------------------------------------------------------

    def directory(self, path: str) -> SourceDirectory | None:
        """The directory at `path`; None if there is none (any more)."""
        info = self._stat(path or ".")
        if info is None or not stat.S_ISDIR(info.st_mode):
            return None
        return SourceDirectory(path=path, mtime_ns=info.st_mtime_ns)

    def lookup(self, directory: str, name: str) -> SourceNode | None:
        """What is served as `name` in a directory; None if nothing is.

        Raises:
            SourceUnreadable: no descriptor is left to look with.
        """
        path = join(directory, name)
        found = [
            node
            for candidate in (name, *(name + suffix for suffix in SUFFIXES))
            if (node := self._examine(directory, candidate)) is not None and node.path == path
        ]
        return _chosen(found)

    def list_directory(self, path: str) -> list[SourceNode]:
        """Everything served in a directory, by name.

        Raises:
            SourceMissing, SourceUnreadable.
        """
        by_path: dict[str, list[SourceNode]] = {}
        for name in self._names(path):
            node = self._examine(path, name)
            if node is not None:
                by_path.setdefault(node.path, []).append(node)
        return [chosen for key in sorted(by_path) if (chosen := _chosen(by_path[key])) is not None]

    def survey(self) -> Survey:
        """Walk the whole source. What cannot be read is listed as ignored, with the reason."""
        files: list[SourceFile] = []
        directories: list[str] = []
        unreadable: list[str] = []
        ignored: list[tuple[str, str]] = []
        pending = [""]
        while pending:
            directory = pending.pop()
            try:
                nodes = self.list_directory(directory)
                names = self._names(directory)
            except (SourceMissing, SourceUnreadable) as error:
                ignored.append((directory, error.detail))
                if isinstance(error, SourceUnreadable):
                    unreadable.append(directory)
                continue
            files += [node for node in nodes if isinstance(node, SourceFile)]
            below = [node.path for node in nodes if isinstance(node, SourceDirectory)]
            directories += below
            pending += below
            used = {join(directory, VOLUME_FILE_NAME)}
            for node in nodes:
                if isinstance(node, SourceFile):
                    used |= {node.source_path, *node.rivals}
                else:
                    used.add(node.path)
            ignored += [
                (path, self._why_ignored(path))
                for name in names
                if (path := join(directory, name)) not in used
            ]
        return Survey(
            files=tuple(sorted(files, key=lambda f: f.path)),
            directories=tuple(sorted(directories)),
            unreadable=tuple(unreadable),
            ignored=tuple(ignored),
        )

    def open_ciphertext(self, source_path: str) -> tuple[int, FileVersion]:
        """Open a ciphertext for reading; the descriptor is the caller's to close.

        Raises:
            SourceMissing: gone, or no regular file any more.
            SourceUnreadable: the disk or its permissions say no.
        """
        try:
            fd = self._open(source_path, os.O_RDONLY)
        except OSError as error:
            raise _translated(error, source_path) from error
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise SourceMissing(f"{source_path} is not a regular file any more")
        return fd, version_of(info)

    def remember_size(self, source_path: str, version: FileVersion, size_bytes: int) -> None:
        """Note the true size of a plaintext, for as long as its ciphertext stays this version."""
        with self._facts_lock:
            facts = self._facts.get(source_path)
            if facts is not None and facts.version == version:
                self._facts[source_path] = replace(facts, size_bytes=size_bytes, size_exact=True)

    # --- one file ----------------------------------------------------------------------------

    def _examine(self, directory: str, name: str) -> SourceNode | None:
        if name == VOLUME_FILE_NAME or not is_utf8(name) or is_hidden(directory, name):
            return None
        source_path = join(directory, name)
        info = self._stat(source_path)
        if info is None:
            return None
        if stat.S_ISDIR(info.st_mode):
            if self._leads_back(directory, source_path, info):
                return None
            return SourceDirectory(path=source_path, mtime_ns=info.st_mtime_ns)
        if not stat.S_ISREG(info.st_mode):
            return None
        served, suffix_taken = served_name(name)
        facts = self._facts_of(source_path, version_of(info))
        if facts is None:
            return None
        if facts.format is Format.UNKNOWN and not (
            suffix_taken and facts.version[2] <= kms_blob.MAX_CIPHERTEXT_BYTES
        ):
            return None
        return SourceFile(
            path=join(directory, served),
            source_path=source_path,
            version=facts.version,
            format=facts.format,
            size_bytes=facts.size_bytes,
            size_exact=facts.size_exact,
            key=facts.key,
            bound=facts.bound,
            suffix_taken=suffix_taken,
            problem=facts.problem,
        )

    def _facts_of(self, source_path: str, version: FileVersion) -> CiphertextFacts | None:
        with self._facts_lock:
            known = self._facts.get(source_path)
        if known is not None and known.version == version:
            return known
        try:
            fd, version = self.open_ciphertext(source_path)
        except (SourceMissing, SourceUnreadable):
            return None
        try:
            facts = read_facts(fd, version)
        except OSError:
            return None
        finally:
            os.close(fd)
        with self._facts_lock:
            self._facts[source_path] = facts
        return facts

    def _stat(self, path: str) -> os.stat_result | None:
        try:
            fd = self._open(path, os.O_PATH)
        except OSError:
            with self._facts_lock:
                self._facts.pop(path, None)
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _open(self, path: str, flags: int) -> int:
        if not flags & os.O_PATH:
            flags |= os.O_NONBLOCK | os.O_NOCTTY
        for _ in range(_OPEN_TRIES):
            try:
                return libc.openat2(self._root_fd, path, flags, RESOLVE)
            except PermissionError:
                if self._open_for_us is None:
                    raise
                return self._open_for_us(path, flags)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    # Not to be taken for a file that is not there.
                    raise SourceUnreadable(
                        f"{path}: {error.strerror}",
                        hint="raise the limit of descriptors (LimitNOFILE, ulimit -n)",
                    ) from None
                # A rename somewhere raced with the resolution of `..` in a link.
                if error.errno != errno.EAGAIN:
                    raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)

    def _names(self, path: str) -> list[str]:
        try:
            fd = self._open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _translated(error, path) from error
        try:
            return os.listdir(fd)
        except OSError as error:
            raise _translated(error, path) from error
        finally:
            os.close(fd)

    def _leads_back(self, directory: str, path: str, info: os.stat_result) -> bool:
        """Whether `path` is a link to a directory above itself, which would never end."""
        try:
            fd = self._open(path, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return True
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                return False
        finally:
            os.close(fd)
        above = (self._stat(ancestor or ".") for ancestor in ancestors(directory))
        return any(a is not None and os.path.samestat(a, info) for a in above)

    def _why_ignored(self, path: str) -> str:
        if not is_utf8(path):
            return "its name is not UTF-8"
        if is_hidden(*path.rpartition("/")[::2]):
            return "names that begin with two dots are not served at the top"
        try:
            fd = self._open(path, os.O_PATH)
        except OSError as error:
            return f"cannot be opened: {error.strerror}"
        try:
            mode = os.fstat(fd).st_mode
        finally:
            os.close(fd)
        if stat.S_ISDIR(mode):
            return "a link that leads back to a directory above"
        if not stat.S_ISREG(mode):
            return "not a regular file"
        directory, _, name = path.rpartition("/")
        if isinstance(self.lookup(directory, served_name(name)[0]), SourceDirectory):
            return "a directory has the name it would be served under"
        try:
            os.close(self.open_ciphertext(path)[0])
        except (SourceMissing, SourceUnreadable) as error:
            return f"cannot be opened: {error.detail.rpartition(': ')[2]}"
        return "of no known format"


def _chosen(found: list[SourceNode]) -> SourceNode | None:
    """One node for one name: a directory before files, a file with its rivals named."""
    for node in found:
        if isinstance(node, SourceDirectory):
            return node
    files = sorted(
        (node for node in found if isinstance(node, SourceFile)), key=lambda f: f.source_path
    )
    if not files:
        return None
    return replace(files[0], rivals=tuple(f.source_path for f in files[1:]))


def _translated(error: OSError, path: str) -> SourceMissing | SourceUnreadable:
    where = path or "the source"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
        return SourceMissing(f"{where}: {error.strerror}")
    return SourceUnreadable(f"{where}: {error.strerror}")
