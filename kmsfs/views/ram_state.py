"""What lies beside the files of a ramfs for whoever takes them over: which they are. No content."""

import hashlib

import msgspec

from kmsfs.settings import MountConfig
from kmsfs.views.ram_plan import RamFile
from kmsfs.views.ram_tree import RamTree


class LeftFiles(msgspec.Struct, frozen=True):
    """The files that a process left.

    Attributes:
        settings: digest of all that decided which files are shown, and how.
        versions: the highest version seen of each file, see `SeenVersions`.
    """

    settings: str
    files: dict[str, RamFile]
    directories: tuple[str, ...]
    versions: dict[str, int] = {}


def encode(
    config: MountConfig,
    files: dict[str, RamFile],
    directories: tuple[str, ...],
    versions: dict[str, int],
) -> bytes:
    """The record of a set of files that this configuration made."""
    return msgspec.json.encode(LeftFiles(_digest(config), files, directories, versions))


def read(tree: RamTree, config: MountConfig) -> LeftFiles | None:
    """What was left, if this configuration would have made the same; else None."""
    raw = tree.read_state()
    if raw is None:
        return None
    try:
        left = msgspec.json.decode(raw, type=LeftFiles)
    except msgspec.DecodeError:
        return None
    return left if left.settings == _digest(config) else None


def _digest(config: MountConfig) -> str:
    same = msgspec.structs.replace(
        config,
        view_reason="",
        require_all=False,
        wait=False,
        strict=False,
        debug=False,
        once=False,
        on_change=(),
        restart=True,
    )
    return hashlib.blake2b(msgspec.json.encode(same), digest_size=16).hexdigest()
