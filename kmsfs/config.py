"""Configuration: kmsfs.toml as people write it, and who may have written it.

An unknown key is an error. What a mount makes of it is `settings.MountConfig`.
"""

import math
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from kmsfs.errors import ConfigInvalid, ConfigUntrusted
from kmsfs.settings import MAX_HOOKS, CacheSettings, OnChange, Rollback, View

VOLUME_FILE_NAME: Final = "kmsfs.toml"
SYSTEM_CONFIG_DIR: Final = Path("/etc/kmsfs")

VOLUME_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a volume may be called; the whole name has to match."""

_NAME_HINT: Final = "letters, digits, dot, dash and underscore, 64 at most"

# A volume file is a page of text; the bound keeps a planted device or huge file from being read.
_MAX_CONFIG_BYTES: Final = 1 << 20

# systemd.unit(5): what the name of a unit may consist of.
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]{0,254}")

_SIZE: Final = re.compile(r"^\s*(\d+)\s*(B|KiB|MiB|GiB)?\s*$")
_SIZE_UNITS: Final = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

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

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration: frozen, and an unknown key is an error."""


class VolumeTable(_Table, frozen=True):
    """`[volume]`."""

    name: str | None = None
    source: str | None = None
    mountpoint: str | None = None
    view: View = "auto"
    unbound: tuple[str, ...] = ()
    rollback: Rollback = "refuse"


class KmsTable(_Table, frozen=True):
    """`[kms]`. Key ids are tried in order for bare blobs."""

    key_ids: tuple[str, ...] = ()
    encryption_context: dict[str, str] = {}
    profile: str | None = None
    role_arn: str | None = None
    region: str | None = None
    endpoint_url: str | None = None
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=120)] = 8.0
    allow_non_committing: bool = False


class CacheTable(_Table, frozen=True):
    """`[cache]`. Sizes are numbers of bytes or texts such as `64MiB`."""

    ttl_s: Seconds | None = None
    idle_s: Seconds = 60.0
    stale_s: Seconds = 0.0
    max_bytes: int | str = "64MiB"
    max_file_bytes: int | str = "16MiB"
    allow_unlocked: bool = False
    prefetch: tuple[str, ...] = ()


class RuleTable(_Table, frozen=True):
    """`[[rule]]`: who owns the files that `match`; the first match wins."""

    match: str
    owner: str | None = None
    group: str | None = None
    mode: str | None = None


class OnChangeTable(_Table, frozen=True):
    """`[[on_change]]`: what to run, or which systemd unit to reload, when files that match change.

    A unit that cannot reload is restarted; one that does not run is left alone.
    """

    match: str
    run: tuple[str, ...] = ()
    unit: str | None = None


class AuditTable(_Table, frozen=True):
    """`[audit]`: the file that records who opened what, and whether opens need it."""

    file: str
    required: bool = False


class VolumeFile(_Table, frozen=True):
    """A whole kmsfs.toml."""

    volume: VolumeTable = VolumeTable()
    kms: KmsTable = KmsTable()
    cache: CacheTable = CacheTable()
    rule: tuple[RuleTable, ...] = ()
    on_change: tuple[OnChangeTable, ...] = ()
    audit: AuditTable | None = None


def parse_size(value: int | str, key: str) -> int:
    """A size in bytes from a number or a text such as `64MiB`.

    Raises:
        ConfigInvalid: not a size; `key` names it.
    """
    if isinstance(value, int):
        if value < 0:
            raise ConfigInvalid(f"{key} = {value}: a size cannot be negative")
        return value
    found = _SIZE.match(value)
    if found is None:
        raise ConfigInvalid(
            f"{key} = {value!r} is not a size",
            hint="a number of bytes, or a number followed by B, KiB, MiB or GiB",
        )
    return int(found[1]) * _SIZE_UNITS[found[2]]


def parse_mode(value: str, key: str) -> int:
    """Permission bits from octal text such as `0440`.

    Raises:
        ConfigInvalid: not octal, or more than permission bits (no setuid, setgid, sticky).
    """
    if not re.fullmatch(r"(0o?)?[0-7]{3}", value):
        raise ConfigInvalid(
            f"{key} = {value!r} is not a mode", hint='permissions in octal, such as "0440"'
        )
    return int(value.replace("o", ""), 8)


def cache_settings(table: CacheTable) -> CacheSettings:
    """`[cache]` with its sizes in bytes and its times checked."""
    for key in ("ttl_s", "idle_s", "stale_s"):
        if not math.isfinite(getattr(table, key) or 0):
            raise ConfigInvalid(f"cache.{key} must be a finite number of seconds")
    return CacheSettings(
        ttl_s=table.ttl_s,
        idle_s=table.idle_s,
        stale_s=table.stale_s,
        max_bytes=parse_size(table.max_bytes, "cache.max_bytes"),
        max_file_bytes=parse_size(table.max_file_bytes, "cache.max_file_bytes"),
        allow_unlocked=table.allow_unlocked,
        prefetch=table.prefetch,
    )


def on_change_settings(table: OnChangeTable) -> OnChange:
    """One `[[on_change]]` as the command that it comes to.

    Raises:
        ConfigInvalid: neither or both of `run` and `unit`, or nothing that could be run.
    """
    if bool(table.run) == (table.unit is not None):
        raise ConfigInvalid(
            f"on_change for {table.match!r} needs either run or unit",
            hint='run = ["systemctl", "reload", "nginx"], or unit = "nginx.service"',
        )
    if table.unit is not None:
        if not _UNIT.fullmatch(table.unit):
            raise ConfigInvalid(f"on_change.unit = {table.unit!r} is not the name of a unit")
        return OnChange(match=table.match, argv=("systemctl", "try-reload-or-restart", table.unit))
    program = table.run[0]
    if not program or ("/" in program and not os.path.isabs(program)):
        raise ConfigInvalid(
            f"on_change.run begins with {program!r}: it has to be an absolute path, or a name",
        )
    if any("\0" in argument for argument in table.run):
        raise ConfigInvalid("on_change.run has an argument with a null character")
    return OnChange(match=table.match, argv=table.run)


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
    raw = _read_toml(path, uid=uid)
    for table, key in _SYSTEM_ONLY:
        if table in raw and (key is None or key in _table(raw, table, path)):
            name = table if key is None else f"{table}.{key}"
            raise ConfigInvalid(
                f"{path}: {name} is accepted from {overlay_dir} only",
                hint=f"set it in {overlay_dir}/NAME.toml",
            )
    own = _convert(raw, path)
    if own.volume.name is None:
        return own
    overlay_path = overlay_dir / f"{own.volume.name}.toml"
    if not overlay_path.exists():
        return own
    overlay = _read_toml(overlay_path, uid=0)
    _convert(overlay, overlay_path)
    return _convert(_merged(raw, overlay), overlay_path)


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
        file = _convert(_read_toml(path, uid=0), path)
        if file.volume.source is None:
            continue
        if file.volume.name not in (None, path.stem) or not VOLUME_NAME.fullmatch(path.stem):
            raise ConfigInvalid(
                f"{path} defines a volume and is not called after it",
                hint=f"call it NAME.toml, NAME being {_NAME_HINT}",
            )
        if not os.path.isabs(file.volume.source):
            raise ConfigInvalid(f"{path}: volume.source is not an absolute path")
        written = Path(os.path.normpath(file.volume.source))
        for root in {written, Path(os.path.realpath(written))}:
            if root in found:
                raise ConfigInvalid(f"{path}: {root} is volume {found[root][0]!r} already")
            found[root] = (path.stem, file)
    return found


def _table(raw: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = raw[name]
    if not isinstance(table, dict):
        raise ConfigInvalid(f"{path}: {name} is not a table", hint=f"write it as [{name}]")
    return table


def _read_toml(path: Path, *, uid: int) -> dict[str, Any]:
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
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: {error}") from error


def _convert(raw: dict[str, Any], path: Path) -> VolumeFile:
    try:
        found = msgspec.convert(raw, VolumeFile)
    except msgspec.ValidationError as error:
        raise ConfigInvalid(f"{path}: {error}") from error
    name = found.volume.name
    if name is not None and not VOLUME_NAME.fullmatch(name):
        raise ConfigInvalid(
            f"{path}: volume.name = {name!r} is not a name",
            hint=_NAME_HINT,
        )
    cache_settings(found.cache)
    for rule in found.rule:
        if rule.mode is not None:
            parse_mode(rule.mode, "rule.mode")
    if len(found.on_change) > MAX_HOOKS:
        raise ConfigInvalid(f"{path} has more than {MAX_HOOKS} tables on_change")
    for hook in found.on_change:
        on_change_settings(hook)
    if found.audit is not None and not os.path.isabs(found.audit.file):
        raise ConfigInvalid(f"{path}: audit.file is not an absolute path")
    return found


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Table by table, key by key; a value, lists and inline tables included, is replaced whole."""
    merged = dict(base)
    for name, table in over.items():
        merged[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    return merged
