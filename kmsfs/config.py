"""Configuration: what a kmsfs.toml may say.

An unknown key is an error. Which files are read is `config_files`' matter; what a mount makes of
them is `settings.MountConfig`.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from kmsfs.errors import ConfigInvalid
from kmsfs.settings import MAX_HOOKS, CacheSettings, OnChange, Rollback, View

VOLUME_FILE_NAME: Final = "kmsfs.toml"

VOLUME_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a volume may be called; the whole name has to match."""

NAME_HINT: Final = "letters, digits, dot, dash and underscore, 64 at most"

# systemd.unit(5): what the name of a unit may consist of.
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]{0,254}")

_SIZE: Final = re.compile(r"^\s*(\d+)\s*(B|KiB|MiB|GiB)?\s*$")
_SIZE_UNITS: Final = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

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


def convert(raw: dict[str, Any], text: str, path: Path) -> VolumeFile:
    """A file's content as its record.

    Args:
        text: what `raw` was read from, and `path` where: for what is to be said of it.

    Raises:
        ConfigInvalid: an unknown key, or an impossible value.
    """
    try:
        found = msgspec.convert(raw, VolumeFile)
    except msgspec.ValidationError as error:
        from kmsfs.config_text import complaint_of

        complaint = complaint_of(error, text, raw, _schema())
        raise ConfigInvalid(f"{path}: {complaint.text}", hint=complaint.hint) from error
    try:
        _check(found)
    except ConfigInvalid as error:
        from kmsfs.config_text import with_line

        raise ConfigInvalid(f"{path}: {with_line(error.detail, text)}", hint=error.hint) from error
    return found


def _schema() -> dict[str, list[str]]:
    """Names of all tables, each with the names of its keys."""
    tables: dict[str, type[_Table]] = {
        "volume": VolumeTable,
        "kms": KmsTable,
        "cache": CacheTable,
        "rule": RuleTable,
        "on_change": OnChangeTable,
        "audit": AuditTable,
    }
    return {
        name: [field.name for field in msgspec.structs.fields(table)]
        for name, table in tables.items()
    }


def _check(found: VolumeFile) -> None:
    """What types do not say.

    Raises:
        ConfigInvalid.
    """
    name = found.volume.name
    if name is not None and not VOLUME_NAME.fullmatch(name):
        raise ConfigInvalid(f"volume.name = {name!r} is not a name", hint=NAME_HINT)
    cache_settings(found.cache)
    for rule in found.rule:
        if rule.mode is not None:
            parse_mode(rule.mode, "rule.mode")
    if len(found.on_change) > MAX_HOOKS:
        raise ConfigInvalid(f"there are more than {MAX_HOOKS} tables on_change")
    for hook in found.on_change:
        on_change_settings(hook)
    if found.audit is not None and not os.path.isabs(found.audit.file):
        raise ConfigInvalid(f"audit.file = {found.audit.file!r} is not an absolute path")
