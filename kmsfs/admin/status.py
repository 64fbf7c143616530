"""What `kmsfs status` shows: the record that crosses the control socket. Light to import."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from kmsfs.errors import KmsfsError
from kmsfs.kms_call import KmsCall
from kmsfs.memory.process import ProcessReport


class NamedProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A file, and what is the matter with it."""

    path: str
    reason: str
    hint: str = ""


class CachedPlaintext(msgspec.Struct, frozen=True, kw_only=True):
    """A plaintext that is in locked memory now.

    Attributes:
        stale: past its `ttl_s`: the next open asks KMS, and gets this only if that fails.
    """

    path: str
    size_bytes: int
    age_s: float
    open_by: int
    stale: bool = False


class AwayKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that KMS is not asked for just now, having been away several times in a row.

    Attributes:
        key: its ARN, or several that a file names; `bare` for bare blobs of no known key.
        reason: how the last call failed.
        again_in_s: when the next open may be tried; 0 where it may now, or is being.
    """

    key: str
    reason: str
    failures: int
    open_for_s: float
    again_in_s: float


class HeldPlaintext(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the ramfs view that was taken away while a program held it.

    Attributes:
        old_path: where it lies now, relative to the ramfs: what /proc shows of its holders.
    """

    path: str
    old_path: str


class RamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the ramfs view has to show.

    Attributes:
        kind: `ramfs` or `tmpfs`.
        swappable: whether the kernel may write the files to swap.
        stale: files shown although KMS could not be asked for them again.
        problem: why the last refresh was not made; empty otherwise.
    """

    kind: str
    swappable: bool
    files: int
    size_bytes: int
    limit_bytes: int
    stale: tuple[NamedProblem, ...]
    held: tuple[HeldPlaintext, ...]
    problem: str


class HookStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An on-change hook, and how it went since the mount began.

    Attributes:
        run: the command, with its arguments.
        problem: what went wrong the last time; empty if nothing did.
    """

    match: str
    run: tuple[str, ...]
    runs: int = 0
    failures: int = 0
    problem: str = ""


class AuditStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where it is recorded who opened what.

    Attributes:
        required: whether an open that cannot be recorded is refused.
        problem: why the last record was not written; empty if it was.
    """

    file: str
    required: bool
    problem: str


class UnattendedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A ramfs that was filled and left: by `--once`, or by a process that was killed."""

    mountpoint: str
    source: str
    view: str = "ramfs"
    attended: bool = False


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What happened in a mount since its daemon began; a daemon that is replaced begins at zero.

    Attributes:
        opens_from_memory: opens of a plaintext that was there, within its time.
        opens_after_decryption: opens that waited for KMS.
        opens_stale: opens served past their time, since KMS could not be asked again.
        opens_refused: opens that failed, by the name of the error. Opens are counted in the FUSE
            view alone: those of a ramfs are the kernel's.
        decryption_s: how long the decryptions took, all together.
        decrypted_bytes: of plaintext.
        decryptions_failed: by the name of the error.
        wiped: plaintexts in locked memory that were overwritten, by reason.
        workers_lost: decrypting processes that ended in the middle of a request.
        breakers_opened: how often a key was found to be away.
        published: how often the ramfs showed a new set of files.
    """

    opens_from_memory: int = 0
    opens_after_decryption: int = 0
    opens_stale: int = 0
    opens_refused: dict[str, int] = {}
    decryptions: int = 0
    decryption_s: float = 0.0
    decrypted_bytes: int = 0
    decryptions_failed: dict[str, int] = {}
    wiped: dict[str, int] = {}
    workers_lost: int = 0
    breakers_opened: int = 0
    published: int = 0


class FileReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the last open of a file met; in the ramfs view, the last decryption of it.

    Attributes:
        state: `stale` is served although KMS could not be asked again; `not asked for` was never
            opened; `locked` goes before all others.
        error, detail, hint: what went wrong; empty if nothing did.
        error_age_s: how long ago; None for what shows without an open.
        version: authenticated `kmsfs:version`; None for files that are not bound, and where the
            ciphertext as it is now was never decrypted. So is what follows.
        key_arn: the key that KMS decrypted it with.
        decrypted_age_s: how long ago.
        opened_age_s: how long ago the last open was; None if there was none.
        from_cache: whether that one was served without asking KMS.
        held: whether its plaintext is in memory now.
        call: the last request to KMS for it.
        credential_source: where credentials come from.
    """

    path: str
    mountpoint: str
    view: str
    state: Literal["served", "stale", "failing", "not asked for", "locked"]
    error: str = ""
    detail: str = ""
    hint: str = ""
    error_age_s: float | None = None
    format: str
    version: int | None = None
    key_arn: str | None = None
    decrypted_age_s: float | None = None
    opened_age_s: float | None = None
    from_cache: bool = False
    held: bool = False
    call: KmsCall | None = None
    credential_source: str | None = None


def named_problems(errors: Mapping[str, KmsfsError]) -> tuple[NamedProblem, ...]:
    """Files with what is the matter with them, as records."""
    return tuple(
        NamedProblem(path=path, reason=f"{error.code}: {error.detail}", hint=error.hint)
        for path, error in errors.items()
    )


class MountStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an administrator may know of a mount; identifiers and numbers only.

    Attributes:
        view_reason: why it is not the FUSE view, where that would have been taken.
        ram: what only the ramfs view has.
        served: number of files; so is each `…_count`, where the lists name the first of many.
        failing: files whose last open failed, or that can never be decrypted.
        unbound: files served although they are not bound to their place.
        stale_count: plaintexts past their time, which are served only while KMS cannot be asked.
        away: keys whose circuit breaker is open.
        budget_bytes: what plaintexts may take of locked memory; `max_bytes` is configured.
        plaintext_in: the kinds of memory that plaintexts lie in.
        weaknesses: guarantees that do not hold, in words.
        hooks: what is run when served files change.
        counters: what happened since the daemon began.
    """

    mountpoint: str
    source: str
    volume: str | None
    view: str
    locked: bool
    served: int
    ignored_count: int
    ignored: tuple[NamedProblem, ...]
    unbound_count: int
    unbound: tuple[str, ...]
    failing: tuple[NamedProblem, ...]
    cached: tuple[CachedPlaintext, ...]
    cached_bytes: int
    budget_bytes: int
    key_ids: tuple[str, ...]
    credential_source: str | None
    daemon_pid: int
    zygote_pid: int | None
    worker_pids: tuple[int, ...]
    daemon: ProcessReport
    workers: ProcessReport | None
    plaintext_in: tuple[str, ...]
    weaknesses: tuple[str, ...]
    view_reason: str = ""
    ram: RamStatus | None = None
    hooks: tuple[HookStatus, ...] = ()
    away: tuple[AwayKey, ...] = ()
    audit: AuditStatus | None = None
    max_bytes: int = 0
    failing_count: int = 0
    stale_count: int = 0
    cached_count: int = 0
    counters: Counters = Counters()
