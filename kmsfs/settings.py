"""Everything one mount needs: resolved to absolute paths and numeric ids, frozen, without secrets.

It travels to the daemon as JSON.
"""

import math
from typing import Final, Literal

import msgspec

View = Literal["fuse", "ramfs", "auto"]
RamKind = Literal["ramfs", "tmpfs"]
Rollback = Literal["refuse", "allow"]

MAX_HOOKS: Final = 64
"""More on-change hooks than this one volume cannot have."""

# How long a plaintext is good without asking KMS again where no ttl_s is set; 0 is for ever.
DEFAULT_TTL_S: Final = {"fuse": 300.0, "ramfs": 0.0}


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the settings."""


class KmsSettings(_Record, frozen=True):
    """How a volume's keys are asked for. Times are in seconds."""

    key_ids: tuple[str, ...] = ()
    any_key: bool = False
    encryption_context: dict[str, str] = {}
    profile: str | None = None
    role_arn: str | None = None
    region: str | None = None
    endpoint_url: str | None = None
    deadline_s: float = 8.0
    allow_non_committing: bool = False


class CacheSettings(_Record, frozen=True):
    """How long and how much plaintext is held.

    `ttl_s` is None until the view is known, whose default it takes then (`DEFAULT_TTL_S`).
    """

    ttl_s: float | None = None
    idle_s: float = 60.0
    stale_s: float = 0.0
    max_bytes: int = 64 << 20
    max_file_bytes: int = 16 << 20
    allow_unlocked: bool = False
    prefetch: tuple[str, ...] = ()

    @property
    def lifetime_s(self) -> float:
        """How long after its decryption a plaintext is good without asking KMS again."""
        ttl_s = DEFAULT_TTL_S["fuse"] if self.ttl_s is None else self.ttl_s
        return ttl_s or math.inf


class RunAs(_Record, frozen=True):
    """An unprivileged user, by numbers."""

    uid: int
    gid: int


class RamSettings(_Record, frozen=True):
    """Which filesystem the ramfs view may fill.

    Attributes:
        kind: tmpfs must be without swap (`noswap`), unless `allow_swap`.
    """

    kind: RamKind = "ramfs"
    allow_swap: bool = False


class OwnershipRule(_Record, frozen=True):
    """A `[[rule]]` with its names resolved; None leaves the mount's default."""

    match: str
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


class Ownership(_Record, frozen=True):
    """What a file or directory has where no rule says otherwise."""

    uid: int
    gid: int
    mode: int = 0o400
    dir_mode: int = 0o555


class OnChange(_Record, frozen=True):
    """An `[[on_change]]`: what is run when served files that `match` change."""

    match: str
    argv: tuple[str, ...]


class AuditSettings(_Record, frozen=True):
    """Where it is recorded who opened what.

    Attributes:
        required: refuse an open that cannot be recorded.
    """

    file: str
    required: bool = False


class MountConfig(_Record, frozen=True):
    """Everything one mount needs; resolved, complete, without secrets.

    `volume_root` is the directory of the kmsfs.toml (or the source where there is none);
    `kmsfs:path` is relative to it. `volume` is None for a directory without a kmsfs.toml.

    Attributes:
        rollback: what becomes of a version older than one that was served from here.
        view: `auto` until the launcher has seen what can be mounted; see `served_as`.
        view_reason: why `auto` became ramfs; empty otherwise.
        require_all: refuse to mount unless every file decrypts.
        wait: be ready only when what `cache.prefetch` names is decrypted.
        strict: refuse to mount unless every promise holds in full.
        run_as: who the daemon becomes; None leaves it the mounting user.
        debug: log more.
        once: fill the ramfs and leave it, with no process behind.
        on_change: what the launcher runs when served files change.
        audit: None where nothing is recorded.
        restart: replace a daemon that died.
    """

    source: str
    mountpoint: str
    volume_root: str
    ownership: Ownership
    volume: str | None = None
    binding_required: bool = False
    unbound: tuple[str, ...] = ()
    rollback: Rollback = "refuse"
    kms: KmsSettings = KmsSettings()
    cache: CacheSettings = CacheSettings()
    rules: tuple[OwnershipRule, ...] = ()
    allow_other: bool = False
    view: View = "auto"
    view_reason: str = ""
    ram: RamSettings = RamSettings()
    require_all: bool = False
    wait: bool = False
    strict: bool = False
    run_as: RunAs | None = None
    debug: bool = False
    once: bool = False
    on_change: tuple[OnChange, ...] = ()
    audit: AuditSettings | None = None
    restart: bool = True

    def served_as(self, view: Literal["fuse", "ramfs"], reason: str = "") -> "MountConfig":
        """This configuration once the view is decided, with what follows from it."""
        cache = self.cache
        if cache.ttl_s is None:
            cache = msgspec.structs.replace(cache, ttl_s=DEFAULT_TTL_S[view])
        return msgspec.structs.replace(self, view=view, view_reason=reason, cache=cache)


def path_matches(pattern: str, path: str) -> bool:
    """Whether a served path, relative to its volume, is meant by a pattern of kmsfs.toml.

    `*` and `?` stay within one directory, `**` spans any number of them; names that begin with
    a dot are matched like others.
    """
    # Imported here because most mounts have no patterns and all of them start.
    from wcmatch import glob

    return bool(glob.globmatch(path, pattern, flags=glob.GLOBSTAR | glob.DOTGLOB | glob.FORCEUNIX))
