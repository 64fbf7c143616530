"""What a volume's configuration comes to: where each value is from, and what in it is wrong."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import msgspec

from kmsfs.config import VolumeFile
from kmsfs.config_files import (
    SYSTEM_CONFIG_DIR,
    ConfigFile,
    merged,
    system_file,
    volume_files,
)
from kmsfs.config_text import line_of
from kmsfs.errors import ConfigInvalid, UsageInvalid
from kmsfs.manage.mounting import check_volume_file
from kmsfs.manage.place import VolumeHere, volume_above
from kmsfs.settings import path_matches
from kmsfs.store.source import Source

DEFAULT_ORIGIN: Final = "default"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A volume's configuration.

    Attributes:
        root: the volume's directory.
        files: what it is made of; what a later one sets replaces.
        record: all of them together.
    """

    root: Path
    name: str
    files: tuple[ConfigFile, ...]
    record: VolumeFile

    @property
    def here(self) -> VolumeHere:
        """The volume as commands on files see it."""
        return VolumeHere(self.root, self.name, self.record)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value, and where it comes from.

    Attributes:
        number: of the table, in an array of tables; 0 elsewhere.
        origin: the path of a file, or `DEFAULT_ORIGIN`.
    """

    table: str
    number: int
    key: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something that is allowed and probably not meant."""

    text: str
    hint: str


def configuration_of(target: str, *, system_dir: Path = SYSTEM_CONFIG_DIR) -> Configuration:
    """The configuration of a volume.

    Args:
        target: a directory in it, or NAME of a file /etc/kmsfs/NAME.toml that names its source.

    Raises:
        UsageInvalid: there is no such volume.
        ConfigInvalid, ConfigUntrusted: its files cannot be honoured.
    """
    if os.path.isdir(target):
        here = volume_above(Path(target), system_dir=system_dir)
        if here is None:
            raise UsageInvalid(
                f"no kmsfs.toml lies in or above {target}", hint="make a volume: `kmsfs init`"
            )
        return _configuration(here, system_dir)
    return _named(target, system_dir)


def settings_in(configuration: Configuration) -> Iterator[Setting]:
    """Every value, in the order of the schema; of arrays of tables those that are there."""
    for field in msgspec.structs.fields(VolumeFile):
        tables = getattr(configuration.record, field.name)
        origins = [file for file in reversed(configuration.files) if field.name in file.raw]
        for number, table in enumerate(tables if isinstance(tables, tuple) else (tables,)):
            if table is None:
                continue
            for key in msgspec.structs.fields(type(table)):
                value = getattr(table, key.name)
                yield Setting(
                    table=field.name,
                    number=number,
                    key=key.name,
                    value=value,
                    origin=_origin(origins, field.name, number, key.name),
                )


def check(configuration: Configuration) -> list[Doubt]:
    """Look for what a mount would refuse, and for what is probably not meant.

    Raises:
        ConfigInvalid: owners or groups that are not there, sizes that contradict each other.
        SourceMissing, SourceUnreadable: the volume's directory.
    """
    check_volume_file(configuration.record)
    doubts = list(_patterns_without_files(configuration))
    if not configuration.record.kms.key_ids:
        doubts.append(Doubt("no key_ids under [kms]", "name the keys there, or with --key-id"))
    return doubts


def named_mount(name: str, *, system_dir: Path = SYSTEM_CONFIG_DIR) -> tuple[str, str]:
    """Source and mountpoint of /etc/kmsfs/NAME.toml.

    Raises:
        UsageInvalid: there is no such file.
        ConfigInvalid, ConfigUntrusted: it cannot be honoured, or does not say where to mount.
    """
    if "/" in name:
        raise UsageInvalid(
            f"where is {name} to be mounted?",
            hint=f"name a MOUNTPOINT, or a file of {system_dir} without its suffix",
        )
    volume = _named(name, system_dir).record.volume
    assert volume.source is not None, "it was found by it"
    if volume.mountpoint is None:
        raise ConfigInvalid(
            f"{system_dir}/{name}.toml: mountpoint is missing under [volume]",
            hint="set it there, or name a SOURCE and a MOUNTPOINT",
        )
    if not os.path.isabs(volume.mountpoint):
        raise ConfigInvalid(f"{system_dir}/{name}.toml: volume.mountpoint is not an absolute path")
    return volume.source, volume.mountpoint


def _named(name: str, system_dir: Path) -> Configuration:
    file = system_file(name, system_dir=system_dir)
    if file is None:
        raise UsageInvalid(
            f"there is no directory {name}, and no {system_dir}/{name}.toml",
            hint="name a directory, or a file there without its suffix",
        )
    source = file.record().volume.source
    if source is None:
        raise ConfigInvalid(
            f"{file.path}: source is missing under [volume]", hint="the directory of ciphertext"
        )
    here = volume_above(Path(source), system_dir=system_dir)
    if here is None or here.name != name:
        of = "of no volume" if here is None else f"of volume {here.name!r}"
        raise ConfigInvalid(f"{file.path}: {source} is {of}", hint="see the kmsfs.toml there")
    return _configuration(here, system_dir)


def _configuration(here: VolumeHere, system_dir: Path) -> Configuration:
    own = here.root / "kmsfs.toml"
    if own.exists():
        files = volume_files(own, uid=os.geteuid(), overlay_dir=system_dir)
    else:
        system = system_file(here.name, system_dir=system_dir)
        assert system is not None, "it was read a moment ago"
        files = (system,)
    return Configuration(here.root, here.name, files, merged(files))


def _origin(files: list[ConfigFile], table: str, number: int, key: str) -> str:
    for file in files:
        raw: Any = file.raw[table]
        if isinstance(raw, list):
            return str(file.path) if key in raw[number] else DEFAULT_ORIGIN
        if key in raw:
            return str(file.path)
    return DEFAULT_ORIGIN


def _patterns_without_files(configuration: Configuration) -> Iterator[Doubt]:
    record = configuration.record
    patterns: list[tuple[str, int, str, str]] = [
        *(("volume", 0, "unbound", pattern) for pattern in record.volume.unbound),
        *(("cache", 0, "prefetch", pattern) for pattern in record.cache.prefetch),
        *(("rule", number, "match", rule.match) for number, rule in enumerate(record.rule)),
        *(("on_change", number, "match", h.match) for number, h in enumerate(record.on_change)),
    ]
    if not patterns:
        return
    paths = [file.path for file in Source(str(configuration.root)).survey().files]
    for table, number, key, pattern in patterns:
        if any(path_matches(pattern, path) for path in paths):
            continue
        place = next(
            (
                f"{file.path}: line {line}: "
                for file in reversed(configuration.files)
                if (line := line_of(file.text, table, key, number)) is not None
            ),
            "",
        )
        close = get_close_matches(pattern, paths, n=1)
        yield Doubt(
            f"{place}{table}.{key}: {pattern!r} matches no file",
            f"did you mean {close[0]!r}?" if close else "paths are relative to the volume's root",
        )
