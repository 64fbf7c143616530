"""From what an administrator asked for to the `MountConfig` that launcher and daemon obey."""

import grp
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from kmsfs.config import (
    RuleTable,
    VolumeFile,
    cache_settings,
    on_change_settings,
    parse_mode,
)
from kmsfs.errors import ConfigInvalid, InputUnreadable, MountpointUnusable, UsageInvalid
from kmsfs.manage.input import check_utf8
from kmsfs.manage.keys import KeyOptions, settings_for
from kmsfs.manage.place import volume_above
from kmsfs.settings import (
    AuditSettings,
    CacheSettings,
    MountConfig,
    Ownership,
    OwnershipRule,
    RamKind,
    RamSettings,
    RunAs,
    View,
)
from kmsfs.views.mountpoint import resolve

# What mount(8), fstab and systemd pass along and what is so in any case.
_ACCEPTED_OPTIONS: Final = frozenset(
    {"ro", "rw", "nosuid", "nodev", "noexec", "defaults", "noatime", "relatime", "nodiratime"}
    | {"auto", "noauto", "user", "nouser", "nofail", "_netdev"}
)
_VALUE_OPTIONS: Final = frozenset(
    {"profile", "region", "endpoint_url", "owner", "group", "mode", "dir_mode", "view", "ram"}
)
_FLAG_OPTIONS: Final = frozenset(
    {"allow_other", "allow_swap", "require_all", "wait", "strict", "debug", "once", "no_restart"}
)
_VIEWS: Final[tuple[View, ...]] = ("auto", "fuse", "ramfs")
_RAM_KINDS: Final[tuple[RamKind, ...]] = ("ramfs", "tmpfs")


Name = TypeVar("Name", bound=str)

_ID: Final = re.compile(r"[0-9]{1,10}")
# The number above it, -1 to the kernel, means nobody.
_MAX_ID: Final = 0xFFFF_FFFE


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the command line says; None and empty where it says nothing. Modes are octal text."""

    keys: KeyOptions = field(default_factory=KeyOptions)
    owner: str | None = None
    group: str | None = None
    mode: str | None = None
    dir_mode: str | None = None
    view: str | None = None
    ram: str | None = None
    allow_other: bool = False
    allow_swap: bool = False
    require_all: bool = False
    wait: bool = False
    strict: bool = False
    user: str | None = None
    debug: bool = False
    once: bool = False
    no_restart: bool = False


def with_option_text(options: MountOptions, text: str) -> MountOptions:
    """`options`, and those of one `-o` text as in mount(8): comma-separated, `\\,` for a comma.

    Raises:
        UsageInvalid: an unknown option, or a value that is missing.
    """
    keys = options.keys
    changes: dict[str, Any] = {}
    for item in _split(text):
        name, has_value, value = item.partition("=")
        if name == "user" and has_value:
            changes["user"] = value
            continue
        if name in _ACCEPTED_OPTIONS or name.startswith("x-") or not item:
            continue
        if name == "any_key" and not has_value:
            keys = replace(keys, any_key=True)
            continue
        if name in _FLAG_OPTIONS and not has_value:
            changes[name] = True
            continue
        if name not in _VALUE_OPTIONS | {"key_id", "encryption_context"}:
            raise UsageInvalid(
                f"unknown mount option {name!r}", hint="see `kmsfs mount --help` for the options"
            )
        if not value:
            raise UsageInvalid(f"mount option {name!r} needs a value: {name}=…")
        if name == "key_id":
            keys = replace(keys, key_ids=(*keys.key_ids, value))
        elif name == "encryption_context":
            key, equals, pair_value = value.partition("=")
            if not (key and equals and pair_value):
                raise UsageInvalid(f"encryption_context={value} is not of the form K=V")
            keys = replace(keys, encryption_context={**keys.encryption_context, key: pair_value})
        elif name == "profile":
            keys = replace(keys, profile=value)
        elif name == "region":
            keys = replace(keys, region=value)
        elif name == "endpoint_url":
            keys = replace(keys, endpoint_url=value)
        else:
            changes[name] = value
    return replace(options, keys=keys, **changes)


def mount_config(source: str, mountpoint: str, options: MountOptions) -> MountConfig:
    """Everything the mount needs, from the volume's kmsfs.toml and the options over it.

    Raises:
        InputUnreadable: no such source directory.
        MountpointUnusable: it lies in the source, or the source in it.
        ConfigInvalid, ConfigUntrusted: the volume's kmsfs.toml.
        UsageInvalid: impossible options, or no key.
    """
    source_path = os.path.realpath(source)
    mountpoint_path = resolve(mountpoint)
    for path in (source_path, mountpoint_path):
        check_utf8(path, "path", hint="rename it, or mount elsewhere")
    if not os.path.isdir(source_path):
        raise InputUnreadable(f"{source} is not a directory")
    _check_apart(source_path, mountpoint_path)
    volume = volume_above(Path(source_path))
    file = volume.file if volume is not None else VolumeFile()
    if options.keys.any_key and options.keys.key_ids:
        raise UsageInvalid("--any-key and --key-id contradict each other")
    kms = settings_for(volume, options.keys)
    if options.keys.any_key:
        kms = msgspec.structs.replace(kms, key_ids=())
    if not kms.key_ids and not kms.any_key:
        raise UsageInvalid(
            "no key is allowed to decrypt anything",
            hint="name the keys with --key-id, or make the directory a volume: `kmsfs init`",
        )
    return MountConfig(
        source=source_path,
        mountpoint=mountpoint_path,
        volume_root=str(volume.root) if volume is not None else source_path,
        volume=volume.name if volume is not None else None,
        binding_required=volume is not None,
        unbound=file.volume.unbound,
        rollback=file.volume.rollback,
        kms=msgspec.structs.replace(kms, deadline_s=file.kms.deadline_s),
        cache=_checked_cache(file),
        rules=tuple(_resolved(rule) for rule in file.rule),
        ownership=_ownership(options),
        allow_other=os.geteuid() == 0 or options.allow_other,
        view=_view(options, file),
        ram=_ram_settings(options),
        require_all=options.require_all,
        wait=options.wait,
        strict=options.strict,
        run_as=_run_as(options.user),
        debug=options.debug,
        once=options.once,
        restart=not options.no_restart,
        on_change=tuple(map(on_change_settings, file.on_change)),
        audit=_audit(file),
    )


def check_volume_file(file: VolumeFile) -> None:
    """Refuse what a mount would refuse of a configuration.

    Raises:
        ConfigInvalid: owners or groups that are not there, sizes that contradict each other.
    """
    _checked_cache(file)
    for rule in file.rule:
        _resolved(rule)


def _ownership(options: MountOptions) -> Ownership:
    defaults = Ownership(uid=os.geteuid(), gid=os.getegid())
    return Ownership(
        uid=defaults.uid if options.owner is None else _uid(options.owner),
        gid=defaults.gid if options.group is None else _gid(options.group),
        mode=defaults.mode if options.mode is None else parse_mode(options.mode, "mode"),
        dir_mode=(
            defaults.dir_mode
            if options.dir_mode is None
            else parse_mode(options.dir_mode, "dir_mode")
        ),
    )


def _resolved(rule: RuleTable) -> OwnershipRule:
    return OwnershipRule(
        match=rule.match,
        uid=None if rule.owner is None else _uid(rule.owner),
        gid=None if rule.group is None else _gid(rule.group),
        mode=None if rule.mode is None else parse_mode(rule.mode, "rule.mode"),
    )


def _uid(name: str) -> int:
    return _number(name, "user", lambda: pwd.getpwnam(name).pw_uid)


def _gid(name: str) -> int:
    return _number(name, "group", lambda: grp.getgrnam(name).gr_gid)


def _number(name: str, what: str, look_up: Callable[[], int]) -> int:
    """The number written in place of a name, or the one that the name has on this machine."""
    if _ID.fullmatch(name):
        number = int(name)
        if number > _MAX_ID:
            raise ConfigInvalid(f"{name} is no {what}'s number: {_MAX_ID} is the highest")
        return number
    try:
        return look_up()
    except (KeyError, ValueError):
        raise ConfigInvalid(f"there is no {what} {name!r} on this machine") from None


def _audit(file: VolumeFile) -> AuditSettings | None:
    if file.audit is None:
        return None
    return AuditSettings(file=file.audit.file, required=file.audit.required)


def _checked_cache(file: VolumeFile) -> CacheSettings:
    settings = cache_settings(file.cache)
    if settings.max_file_bytes > settings.max_bytes:
        raise ConfigInvalid(
            f"cache.max_file_bytes ({settings.max_file_bytes}) is more than cache.max_bytes "
            f"({settings.max_bytes}): the largest file could never be held"
        )
    return settings


def _check_apart(source: str, mountpoint: str) -> None:
    if source == mountpoint or mountpoint.startswith(source.rstrip("/") + "/"):
        raise MountpointUnusable(
            f"{mountpoint} lies in the source {source}", hint="mount somewhere else, under /run"
        )
    if source.startswith(mountpoint.rstrip("/") + "/"):
        raise MountpointUnusable(
            f"mounting at {mountpoint} would hide the source {source}",
            hint="mount somewhere else, under /run",
        )


def _view(options: MountOptions, file: VolumeFile) -> View:
    view = _one_of(_VIEWS, options.view or file.volume.view, "view")
    wants_ram = options.once or options.ram is not None or options.allow_swap
    if wants_ram and view == "fuse":
        raise UsageInvalid(
            "once, ram and allow_swap are options of the ramfs view", hint="--view ramfs"
        )
    if options.user is not None:
        if view == "ramfs" or wants_ram:
            raise UsageInvalid(
                "the ramfs view sets owners, which an unprivileged user cannot",
                hint="leave out --user, or use --view fuse",
            )
        return "fuse"
    if options.once and view == "auto":
        # With nobody behind it FUSE cannot be served.
        return "ramfs"
    return view


def _run_as(name: str | None) -> RunAs | None:
    if name is None:
        return None
    if os.geteuid() != 0:
        raise UsageInvalid("only root can have the daemon run as another user")
    uid = _uid(name)
    if uid == 0:
        raise UsageInvalid("--user is for a user without privileges", hint="leave it out")
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        gid = uid
    return RunAs(uid=uid, gid=gid)


def _ram_settings(options: MountOptions) -> RamSettings:
    kind = _one_of(_RAM_KINDS, options.ram or "ramfs", "ram")
    if options.allow_swap and kind != "tmpfs":
        raise UsageInvalid("a ramfs is never swapped", hint="allow_swap goes with --ram tmpfs")
    return RamSettings(kind=kind, allow_swap=options.allow_swap)


def _one_of(known: tuple[Name, ...], value: str, what: str) -> Name:
    for name in known:
        if name == value:
            return name
    raise UsageInvalid(f"{what} {value!r} is not known", hint=f"one of {', '.join(known)}")


def _split(text: str) -> list[str]:
    """Comma-separated items in which `\\,` stands for a comma and `\\\\` for a backslash."""
    items, current, escaped = [], "", False
    for char in text:
        if escaped:
            current, escaped = current + char, False
        elif char == "\\":
            escaped = True
        elif char == ",":
            items.append(current)
            current = ""
        else:
            current += char
    return [*items, current + ("\\" if escaped else "")]
