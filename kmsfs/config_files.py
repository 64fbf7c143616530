"""Which files make up a volume's configuration, and who may have written them."""

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kmsfs.config import NAME_HINT, VOLUME_NAME, VolumeFile, convert
from kmsfs.errors import ConfigInvalid, ConfigUntrusted

SYSTEM_CONFIG_DIR: Final = Path("/etc/kmsfs")

# A volume file is a page of text; the bound keeps a planted device or huge file from being read.
_MAX_CONFIG_BYTES: Final = 1 << 20

# Keys that name programs, roles or places outside the volume: root decides them, not whoever
# may write the volume.
_SYSTEM_ONLY: Final = (
    ("volume", "source"),
    ("volume", "mountpoint"),
    ("kms", "profile"),
    ("kms", "role_arn"),
    ("on_change", None),
    ("audit", None),
)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One file as it is written.

    Attributes:
        raw: its tables.
        text: what they were read from.
    """

    path: Path
    raw: dict[str, Any]
    text: str

    def record(self) -> VolumeFile:
        """What it says, taken by itself.

        Raises:
            ConfigInvalid: see `config.convert`.
        """
        return convert(self.raw, self.text, self.path)


def check_trusted(path: Path, *, uid: int) -> None:
    """Refuse a configuration file that anybody but root and `uid` could have written.

    The file and every directory above it must belong to root or `uid` and be writable by
    nobody else. A sticky directory such as /tmp passes: in it others can neither rename nor
    replace what is not theirs.

    Raises:
        ConfigUntrusted: with the offending path and its owner.
    """
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        info = os.stat(place)
        sticky_directory = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
        if info.st_uid not in (0, uid):
            raise ConfigUntrusted(
                f"{place} belongs to uid {info.st_uid}, so {path} is not honoured"
            )
        if info.st_mode & 0o022 and not sticky_directory:
            raise ConfigUntrusted(
                f"{place} (owner uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}) can be "
                f"written by others, so {path} is not honoured"
            )


def load_volume_file(path: Path, *, uid: int, overlay_dir: Path = SYSTEM_CONFIG_DIR) -> VolumeFile:
    """Read a volume's kmsfs.toml, and what the system configuration puts in place of it.

    /etc/kmsfs/NAME.toml, NAME being the volume's name, has the same schema; each key set there
    replaces the volume's own.

    Args:
        uid: the mounting user; see `check_trusted`.

    Raises:
        ConfigInvalid: not TOML, an unknown key, a value of the wrong type, a key that only the
            system configuration may set.
        ConfigUntrusted: see `check_trusted`.
    """
    return merged(volume_files(path, uid=uid, overlay_dir=overlay_dir))


def volume_files(
    path: Path, *, uid: int, overlay_dir: Path = SYSTEM_CONFIG_DIR
) -> tuple[ConfigFile, ...]:
    """The files that `load_volume_file` makes one of: what a later one sets replaces.

    Each is valid by itself.

    Raises: see `load_volume_file`.
    """
    own = _read(path, uid=uid)
    for table, key in _SYSTEM_ONLY:
        if table in own.raw and (key is None or key in _table(own, table)):
            name = table if key is None else f"{table}.{key}"
            raise ConfigInvalid(
                f"{path}: {name} is accepted from {overlay_dir} only",
                hint=f"set it in {overlay_dir}/NAME.toml",
            )
    volume_name = own.record().volume.name
    overlay_path = overlay_dir / f"{volume_name}.toml"
    if volume_name is None or not overlay_path.exists():
        return (own,)
    overlay = _read(overlay_path, uid=0)
    overlay.record()
    return own, overlay


def system_file(name: str, *, system_dir: Path = SYSTEM_CONFIG_DIR) -> ConfigFile | None:
    """/etc/kmsfs/NAME.toml; None if there is none. Valid by itself.

    Raises:
        ConfigInvalid, ConfigUntrusted: it cannot be honoured.
    """
    path = system_dir / f"{name}.toml"
    if not VOLUME_NAME.fullmatch(name) or not path.exists():
        return None
    file = _read(path, uid=0)
    file.record()
    return file


def merged(files: tuple[ConfigFile, ...]) -> VolumeFile:
    """Several files as one, table by table and key by key; a value is replaced whole.

    Raises:
        ConfigInvalid: together they say what is impossible.
    """
    raw: dict[str, Any] = {}
    for file in files:
        for name, table in file.raw.items():
            raw[name] = {**raw.get(name, {}), **table} if isinstance(table, dict) else table
    return convert(raw, files[-1].text, files[-1].path)


def system_volumes(system_dir: Path = SYSTEM_CONFIG_DIR) -> dict[Path, tuple[str, VolumeFile]]:
    """Volumes that the system configuration defines alone: its files that have `volume.source`.

    Returns:
        Name and file of the volume at each root directory. A root is `volume.source`, as it is
        written and also with its symbolic links resolved. The name is the file's own.

    Raises:
        ConfigInvalid: a file cannot be read or honoured, contradicts its own name, or claims
            another's directory.
        ConfigUntrusted: see `check_trusted`.
    """
    try:
        paths = sorted(path for path in system_dir.iterdir() if path.suffix == ".toml")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigInvalid(f"{system_dir}: {error.strerror}") from error
    found: dict[Path, tuple[str, VolumeFile]] = {}
    for path in paths:
        file = _read(path, uid=0).record()
        if file.volume.source is None:
            continue
        if file.volume.name not in (None, path.stem) or not VOLUME_NAME.fullmatch(path.stem):
            raise ConfigInvalid(
                f"{path} defines a volume and is not called after it",
                hint=f"call it NAME.toml, NAME being {NAME_HINT}",
            )
        if not os.path.isabs(file.volume.source):
            raise ConfigInvalid(f"{path}: volume.source is not an absolute path")
        written = Path(os.path.normpath(file.volume.source))
        for root in {written, Path(os.path.realpath(written))}:
            if root in found:
                raise ConfigInvalid(f"{path}: {root} is volume {found[root][0]!r} already")
            found[root] = (path.stem, file)
    return found


def _table(file: ConfigFile, name: str) -> dict[str, Any]:
    table = file.raw[name]
    if not isinstance(table, dict):
        raise ConfigInvalid(f"{file.path}: {name} is not a table", hint=f"write it as [{name}]")
    return table


def _read(path: Path, *, uid: int) -> ConfigFile:
    check_trusted(path, uid=uid)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigInvalid(f"{path} is not a regular file")
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid(f"{path}: {error.strerror}") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise ConfigInvalid(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        decoded = text.decode()
        return ConfigFile(path, tomllib.loads(decoded), decoded)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: {error}") from error
