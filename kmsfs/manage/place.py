"""Where a file lies: the volume above it, what that says, and the path it is served under."""

import os
from dataclasses import dataclass
from pathlib import Path

from kmsfs.config import VOLUME_FILE_NAME, VolumeFile
from kmsfs.config_files import SYSTEM_CONFIG_DIR, load_volume_file, system_volumes
from kmsfs.errors import ConfigInvalid, UsageInvalid
from kmsfs.formats.binding import Place
from kmsfs.formats.detect import served_name
from kmsfs.settings import path_matches


@dataclass(frozen=True, slots=True)
class VolumeHere:
    """A volume as commands see it: its root directory, name and configuration."""

    root: Path
    name: str
    file: VolumeFile

    def may_be_unbound(self, path: str) -> bool:
        """Whether this volume serves `path` without a binding."""
        return any(path_matches(pattern, path) for pattern in self.file.volume.unbound)


def volume_above(directory: Path, *, system_dir: Path = SYSTEM_CONFIG_DIR) -> VolumeHere | None:
    """The volume that a directory belongs to; None if it belongs to none.

    Its root is the nearest directory at or above this one that has a kmsfs.toml, or else the
    nearest that a file of the system configuration names as its `volume.source`.

    The path is taken as it is written first, and with its symbolic links resolved second: a
    link inside a volume leads to paths of that volume, a link from outside leads into it.

    Raises:
        ConfigInvalid, ConfigUntrusted: the configuration cannot be honoured.
    """
    as_written = Path(os.path.abspath(directory))
    resolved = Path(os.path.realpath(directory))
    places = (as_written, *as_written.parents, resolved, *resolved.parents)
    for root in places:
        if (root / VOLUME_FILE_NAME).exists():
            return _volume_at(root, system_dir)
    # Read only now: a bad file there stops no volume that has its own.
    defined = system_volumes(system_dir)
    for root in places:
        if root in defined:
            return VolumeHere(root, *defined[root])
    return None


def _volume_at(root: Path, system_dir: Path) -> VolumeHere:
    path = root / VOLUME_FILE_NAME
    file = load_volume_file(path, uid=os.geteuid(), overlay_dir=system_dir)
    if file.volume.name is None:
        raise ConfigInvalid(
            f"{path} does not name its volume", hint='add name = "..." under [volume]'
        )
    return VolumeHere(root, file.volume.name, file)


class Volumes:
    """`volume_above`, read once for each directory: for commands that work on many files."""

    def __init__(self) -> None:
        self._found: dict[Path, VolumeHere | None] = {}

    def above(self, directory: Path) -> VolumeHere | None:
        """As `volume_above`, of when it was first asked."""
        if directory not in self._found:
            self._found[directory] = volume_above(directory)
        return self._found[directory]


def place_of(path: Path, volume: VolumeHere | None) -> Place:
    """The place of a ciphertext file: its served path, relative to its volume's root.

    Without a volume it is the served name alone.

    Raises:
        UsageInvalid: the path is not UTF-8.
    """
    name, _ = served_name(path.name)
    if volume is None:
        return Place(None, _checked(name))
    return Place(volume.name, _checked(_relative(path.with_name(name), volume.root)))


def _relative(path: Path, root: Path) -> str:
    relative = os.path.relpath(os.path.abspath(path), root)
    if relative.startswith("../"):
        in_real_directory = os.path.join(os.path.realpath(path.parent), path.name)
        relative = os.path.relpath(in_real_directory, root)
    return relative


def _checked(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageInvalid(
            f"the name {os.fsencode(path)!r} is not UTF-8", hint="rename the file"
        ) from None
    return path
