"""Inode numbers: derived from the path, the same over restarts, one version at a time.

The kernel's page cache belongs to the inode. So while an older version is open, a newer one
gets a fresh number; once the kernel has forgotten the older, the path's own number is used
again.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from kmsfs.store.names import is_at_or_below
from kmsfs.store.source import SourceDirectory, SourceFile, SourceNode

# FUSE_ROOT_ID of linux/fuse.h.
ROOT_NUMBER: Final = 1

# Numbers fit a signed 64-bit integer, which some programs keep them in.
_NUMBER_BITS: Final = 63

# As many versions of one file may be open at once; collisions take one each.
_MAX_ATTEMPTS: Final = 1024


@dataclass(eq=False, slots=True)
class Inode:
    """What the kernel knows under one number.

    Attributes:
        lookups: the kernel's references (LOOKUP and READDIRPLUS less FORGET).
        opens: descriptors of this version; while there are any, `node` does not change.
    """

    number: int
    node: SourceNode
    lookups: int = 0
    opens: int = 0

    @property
    def path(self) -> str:
        """Served path, relative to the source."""
        return self.node.path


class InodeTable:
    """All inodes the kernel knows, by number."""

    def __init__(self, root: SourceDirectory) -> None:
        self._by_number: dict[int, Inode] = {
            ROOT_NUMBER: Inode(ROOT_NUMBER, root, lookups=1),
        }
        # How many numbers a path has needed at most, for the few that needed more than one.
        self._attempts: dict[str, int] = {}

    def get(self, number: int) -> Inode | None:
        """The inode of a number that the kernel was told; None once forgotten."""
        return self._by_number.get(number)

    def files_known(self, place: str = "") -> list[int]:
        """Numbers of all files at or below a path that the kernel knows."""
        return [
            number
            for number, inode in self._by_number.items()
            if isinstance(inode.node, SourceFile) and is_at_or_below(inode.path, place)
        ]

    def numbers_of(self, path: str) -> list[int]:
        """Every number under which the kernel knows a file: its own and those of versions."""
        found = []
        for attempt in range(self._attempts.get(path, 1)):
            inode = self._by_number.get(_number(path, "file", attempt))
            if inode is not None and inode.path == path:
                found.append(inode.number)
        return found

    def directory_number(self, path: str) -> int | None:
        """The number under which the kernel knows a directory; None if it does not."""
        for attempt in range(self._attempts.get(path, 1)):
            number = _number(path, "directory", attempt) if path else ROOT_NUMBER
            inode = self._by_number.get(number)
            if inode is not None and inode.path == path:
                return number
        return None

    def assign(self, node: SourceNode) -> Inode:
        """The inode for a node as it is now: the path's own number, if that is free for it.

        The caller counts the kernel's reference (`lookups`), or calls `drop_unreferenced`.
        """
        if not node.path:
            root = self._by_number[ROOT_NUMBER]
            root.node = node
            return root
        kind = "directory" if isinstance(node, SourceDirectory) else "file"
        for attempt in range(_MAX_ATTEMPTS):
            number = _number(node.path, kind, attempt)
            if number == ROOT_NUMBER:
                continue
            inode = self._by_number.get(number)
            if inode is None:
                inode = self._by_number[number] = Inode(number, node)
                if attempt:
                    self._attempts[node.path] = max(self._attempts.get(node.path, 1), attempt + 1)
                return inode
            if inode.path == node.path and _may_show(inode, node):
                inode.node = node
                return inode
            # Taken by another path (a collision) or by an older version that is open: next.
        raise OverflowError(f"{_MAX_ATTEMPTS} versions of {node.path} are open at once")

    def forget(self, number: int, lookups: int) -> None:
        """The kernel drops references."""
        inode = self._by_number.get(number)
        if inode is not None and number != ROOT_NUMBER:
            inode.lookups -= lookups
            self.drop_unreferenced(inode)

    def drop_unreferenced(self, inode: Inode) -> None:
        """Forget an inode that neither the kernel nor a descriptor refers to."""
        if inode.lookups <= 0 and inode.opens == 0 and inode.number != ROOT_NUMBER:
            self._by_number.pop(inode.number, None)


def same_version(inode: Inode, node: SourceNode) -> bool:
    """Whether an inode stands for exactly this version of a file."""
    return (
        isinstance(inode.node, SourceFile)
        and isinstance(node, SourceFile)
        and inode.node.version == node.version
        and inode.node.source_path == node.source_path
    )


def _may_show(inode: Inode, node: SourceNode) -> bool:
    return isinstance(node, SourceDirectory) or inode.opens == 0 or same_version(inode, node)


def _number(path: str, kind: str, attempt: int) -> int:
    seed = f"{kind}\0{attempt}\0{path}".encode()
    digest = hashlib.blake2b(seed, digest_size=8, person=b"kmsfs inode").digest()
    return int.from_bytes(digest) >> (64 - _NUMBER_BITS)
