"""Gathers a mount's status, in the daemon: walks the source and looks at the cache; never KMS."""

import os
from typing import Final

import trio

from kmsfs.admin.explain import problem_of
from kmsfs.admin.status import (
    AwayKey,
    CachedPlaintext,
    MountStatus,
    NamedProblem,
    RamStatus,
    named_problems,
)
from kmsfs.decryptor.client import DecryptorClient
from kmsfs.error_codes import from_code
from kmsfs.errors import KmsfsError
from kmsfs.memory.process import ProcessReport, descriptor_limit, report
from kmsfs.memory.sandbox import SandboxReport
from kmsfs.settings import MountConfig
from kmsfs.store.cache import MAX_WAITING
from kmsfs.store.source import SourceFile, Survey
from kmsfs.store.volume import Volume

# What a status names one by one; beyond it only the count tells.
_MAX_NAMED: Final = 1000

# For walking the source; a part of the time that an answer on the control socket may take.
_SURVEY_S: Final = 20.0

_NO_ANSWER: Final = Survey(
    files=(), directories=(), unreadable=("",), ignored=(("", "the source does not answer"),)
)

# Of a key's name; a file may name many at once.
_MAX_KEY: Final = 1000


async def gather(
    config: MountConfig,
    volume: Volume,
    client: DecryptorClient,
    sandbox: SandboxReport,
    ram: RamStatus | None,
) -> MountStatus:
    """The mount as it is now, but for what others than these know of it.

    Args:
        sandbox: what confines the daemon.
        ram: what its ramfs view says of itself.
    """
    survey = _NO_ANSWER
    with trio.move_on_after(_SURVEY_S):
        survey = await volume.survey()
    held = volume.cache.held()
    greeting = client.workers.greeting
    daemon = report(memory_locked=False, sandbox=sandbox)
    unbound = [file.path for file in survey.files if not file.bound and volume.may_be_unbound(file)]
    failing = _failing(volume, survey.files)
    stale_count = sum(entry.stale for entry in held) if ram is None else len(ram.stale)
    kinds = tuple(sorted(volume.cache.memory_kinds()))
    return MountStatus(
        mountpoint=config.mountpoint,
        source=config.source,
        volume=config.volume,
        view=config.view,
        view_reason=config.view_reason,
        ram=ram,
        locked=volume.cache.locked,
        served=len(survey.files),
        ignored_count=len(survey.ignored),
        ignored=tuple(
            NamedProblem(path=_printable(path), reason=reason)
            for path, reason in survey.ignored[:_MAX_NAMED]
        ),
        unbound_count=len(unbound),
        unbound=tuple(unbound[:_MAX_NAMED]),
        away=_away(client),
        failing_count=len(failing),
        failing=failing[:_MAX_NAMED],
        stale_count=stale_count,
        cached_count=len(held),
        cached=tuple(
            CachedPlaintext(
                path=entry.path,
                size_bytes=entry.size_bytes,
                age_s=round(entry.age_s, 3),
                open_by=entry.leases,
                stale=entry.stale,
            )
            for entry in held[:_MAX_NAMED]
        ),
        cached_bytes=volume.arena.used_bytes,
        budget_bytes=volume.arena.budget_bytes,
        max_bytes=config.cache.max_bytes,
        key_ids=config.kms.key_ids,
        credential_source=None if greeting is None else greeting.credential_source,
        daemon_pid=os.getpid(),
        zygote_pid=None if greeting is None else greeting.pid,
        worker_pids=client.workers.pids,
        daemon=daemon,
        workers=client.worker_report,
        plaintext_in=kinds,
        weaknesses=tuple(_weaknesses(config, volume, client, daemon=daemon, kinds=kinds, ram=ram)),
    )


def _printable(path: str) -> str:
    """A name that is not UTF-8, as text that is."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _away(client: DecryptorClient) -> tuple[AwayKey, ...]:
    return tuple(
        AwayKey(
            key=found.key[:_MAX_KEY],
            reason=f"{found.error.code}: {found.error.detail}",
            failures=found.failures,
            open_for_s=round(found.open_for_s, 3),
            again_in_s=round(found.again_in_s, 3),
        )
        for found in client.breakers.open_breakers()[:_MAX_NAMED]
    )


def _failing(volume: Volume, files: tuple[SourceFile, ...]) -> tuple[NamedProblem, ...]:
    problems: dict[str, KmsfsError] = {}
    for file in files:
        failure = volume.history.failures.get(file.path)
        problem = problem_of(volume, file)
        if problem is None and failure is not None:
            problem = from_code(failure.error, failure.detail, failure.hint)
        if problem is not None:
            problems[file.path] = problem
    return named_problems(problems)


def _gaps(process: str, found: ProcessReport | None) -> list[str]:
    if found is None or found.sandbox is None:
        return []
    return [f"{process} not fully confined: {gap}" for gap in found.sandbox.gaps]


def _weaknesses(
    config: MountConfig,
    volume: Volume,
    client: DecryptorClient,
    *,
    daemon: ProcessReport,
    kinds: tuple[str, ...],
    ram: RamStatus | None,
) -> list[str]:
    greeting, workers = client.workers.greeting, client.worker_report
    weaknesses = []
    if "unlocked" in kinds:
        weaknesses.append("plaintext lies in memory that is not locked and may be swapped out")
    elif config.cache.allow_unlocked:
        weaknesses.append("plaintext may lie in memory that is not locked (allow_unlocked)")
    if "memfd" in kinds and not config.cache.allow_unlocked:
        weaknesses.append("plaintext lies in a locked memfd: this kernel has no memfd_secret")
    if not daemon.undumpable or not daemon.core_limit_zero:
        weaknesses.append("the daemon's memory could be dumped")
    weaknesses += _gaps("the daemon", daemon) + _gaps("workers", workers)
    if workers is not None and not workers.memory_locked:
        weaknesses.append("workers could not lock their memory: raise the locked-memory limit")
    if workers is not None and not workers.allocator_scrubs:
        weaknesses.append("workers do not overwrite freed memory")
    if greeting is not None and greeting.credential_source == "environment":
        weaknesses.append("credentials come from environment variables: a role is stronger")
    if greeting is not None and not greeting.keeps_credentials:
        weaknesses.append(
            "every worker asks for session credentials anew: this kernel has no memfd_secret"
        )
    if volume.arena.budget_bytes < config.cache.max_bytes:
        weaknesses.append(
            f"locked memory is limited to {volume.arena.budget_bytes} bytes, "
            f"{config.cache.max_bytes} are configured"
        )
    if volume.cache.max_decryptions < MAX_WAITING:
        weaknesses.append(
            f"at most {volume.cache.max_decryptions} files can be decrypted at once: "
            f"{descriptor_limit()} descriptors are allowed (LimitNOFILE, ulimit -n)"
        )
    if ram is not None and ram.swappable:
        weaknesses.append("the tmpfs can be swapped out: a ramfs cannot")
    if ram is not None and ram.problem:
        weaknesses.append(f"the files are not kept in step with the source: {ram.problem}")
    if config.audit is not None and ram is not None:
        weaknesses.append("who opens a file of a ramfs is not recorded")
    if config.rollback == "allow":
        weaknesses.append('older versions of a file may replace newer ones (rollback = "allow")')
    if config.kms.any_key:
        weaknesses.append("any key is accepted")
    return weaknesses
