"""Each promise of a mount with its evidence, graded. Runs outside the mount's own processes.

Evidence comes from the kernel: /proc, /sys, and what processes read back of themselves. A grade
is `good`, `weak` (it holds against less than it should) or `broken`.
"""

import os
from typing import Final, Literal

import msgspec

from kmsfs import libc
from kmsfs.admin import procfs
from kmsfs.admin.procfs import ProcessFacts
from kmsfs.admin.status import MountStatus
from kmsfs.memory.process import ProcessReport

Grade = Literal["good", "weak", "broken"]

_ORDER: Final[tuple[Grade, ...]] = ("good", "weak", "broken")

_MAX_NAMED: Final = 5

_OUR_FAULT: Final = "this is a fault of kmsfs: please report it"

_FILESYSTEMS: Final = {0x858458F6: "ramfs", 0x01021994: "tmpfs"}  # linux/magic.h

# Credentials that do not expire by themselves, by botocore's names.
_STATIC_SOURCES: Final = frozenset({"environment", "shared-credentials-file", "config-file"})


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One promise: how well it holds, how one knows, and what to do."""

    promise: str
    grade: Grade
    evidence: str
    todo: str = ""


class SecurityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All promises of one mount; `grade` is the worst."""

    mountpoint: str
    grade: Grade
    findings: tuple[Finding, ...]


def assess(status: MountStatus, device: str) -> SecurityReport:
    """Look at a mount from outside.

    Args:
        status: what the mount says of itself; its processes are looked up in /proc.
        device: `major:minor` of its filesystem.
    """
    daemon = procfs.process_facts(status.daemon_pid)
    zygote = None if status.zygote_pid is None else procfs.process_facts(status.zygote_pid)
    workers = [facts for pid in status.worker_pids if (facts := procfs.process_facts(pid))]
    findings = (
        _memory(status, daemon),
        _view(status, device),
        _swap(status, daemon, zygote, workers),
        _dumps(status, [facts for facts in (daemon, zygote, *workers) if facts]),
        _confinement(status, daemon),
        _environment(status),
        _hibernation(status),
        _freed_pages(),
        _credentials(status),
        _keys(status),
    )
    grade = max((finding.grade for finding in findings), key=_ORDER.index)
    return SecurityReport(mountpoint=status.mountpoint, grade=grade, findings=findings)


def _memory(status: MountStatus, daemon: ProcessFacts | None) -> Finding:
    promise = "plaintext lies in memory that is locked and that root cannot read"
    if daemon is None:
        return Finding(promise=promise, grade="broken", evidence="the daemon is gone")
    limit = daemon.memlock_limit_bytes
    locked = f"VmLck {daemon.locked_kib} KiB, limit {'none' if limit is None else f'{limit} bytes'}"
    kinds = ", ".join(status.plaintext_in)
    if "unlocked" in status.plaintext_in:
        return Finding(
            promise=promise,
            grade="broken",
            evidence=f"{kinds}; {locked}",
            todo="raise the locked-memory limit (LimitMEMLOCK, ulimit -l), drop allow_unlocked",
        )
    if status.budget_bytes < status.max_bytes:
        return Finding(
            promise=promise,
            grade="weak",
            evidence=f"room for {status.budget_bytes} of {status.max_bytes} bytes; {locked}",
            todo="raise the locked-memory limit (LimitMEMLOCK, ulimit -l), or lower max_bytes",
        )
    if "memfd" in status.plaintext_in or not _has_memfd_secret():
        return Finding(
            promise=promise,
            grade="weak",
            evidence=f"{kinds or 'none held'}, no memfd_secret; {locked}",
            todo="boot with secretmem.enable=1, or Linux 6.5 or later",
        )
    return Finding(
        promise=promise,
        grade="good",
        evidence=f"{kinds or 'none held, memfd_secret is there'}; {locked}",
    )


def _view(status: MountStatus, device: str) -> Finding:
    ram = status.ram
    if ram is not None:
        promise = "the files lie in a filesystem that is never swapped"
        evidence = f"{_magic_of(status.mountpoint)}, {ram.files} files, {ram.size_bytes} bytes"
        if ram.swappable:
            return Finding(
                promise=promise,
                grade="weak",
                evidence=f"{evidence}, can be swapped out",
                todo="use a ramfs, or mount the tmpfs with noswap",
            )
        if ram.problem:
            return Finding(
                promise=promise,
                grade="weak",
                evidence=ram.problem,
                todo="see to what is mounted there, then `kmsfs umount` and mount again",
            )
        return Finding(promise=promise, grade="good", evidence=evidence)
    promise = "no plaintext lies in the kernel's page cache"
    mappers = procfs.mappers_of(device)
    if mappers:
        return Finding(
            promise=promise,
            grade="weak",
            evidence=f"mapped by {', '.join(mappers[:_MAX_NAMED])}",
            todo="let these programs read instead; `kmsfs lock` drops the pages",
        )
    return Finding(promise=promise, grade="good", evidence="direct_io, no program maps a file")


def _swap(
    status: MountStatus,
    daemon: ProcessFacts | None,
    zygote: ProcessFacts | None,
    workers: list[ProcessFacts],
) -> Finding:
    promise = "no plaintext reaches swap"
    devices = procfs.swap_devices()
    named = ", ".join(f"{device.path} ({device.kind})" for device in devices) or "none"
    processes = [facts for facts in (daemon, zygote, *workers) if facts is not None]
    swapped = ", ".join(f"{facts.name} {facts.swapped_kib} KiB" for facts in processes)
    reported = status.workers
    locked = (
        reported.memory_locked
        if reported is not None
        else zygote is not None and zygote.can_lock_all
    )
    evidence = (
        f"swap devices: {named}; workers {'lock' if locked else 'cannot lock'} all their memory; "
        f"VmSwap: {swapped}"
    )
    harmless = all(device.kind != "plain" for device in devices)
    forbidden = zygote is not None and procfs.swap_is_forbidden(zygote.pid)
    if locked or not devices or forbidden:
        return Finding(promise=promise, grade="good", evidence=evidence)
    return Finding(
        promise=promise,
        grade="weak",
        evidence=evidence + ("; what is swapped is encrypted" if devices and harmless else ""),
        todo="raise LimitMEMLOCK, set memory.swap.max=0 for it, or switch swap off",
    )


def _dumps(status: MountStatus, processes: list[ProcessFacts]) -> Finding:
    promise = "no process can be dumped or traced"
    reports: list[tuple[str, ProcessReport | None]] = [
        ("daemon", status.daemon),
        ("worker", status.workers),
    ]
    dumpable = [name for name, report in reports if report is not None and not report.undumpable]
    with_core = [facts.name for facts in processes if facts.core_limit_bytes != 0]
    evidence = (
        f"dumpable: {', '.join(dumpable) or 'none'}; with a core limit: "
        f"{', '.join(with_core) or 'none'}; core_pattern {procfs.core_pattern()!r}"
    )
    grade: Grade = "broken" if dumpable else "weak" if with_core else "good"
    return Finding(
        promise=promise,
        grade=grade,
        evidence=evidence,
        todo="" if grade == "good" else _OUR_FAULT,
    )


def _confinement(status: MountStatus, daemon: ProcessFacts | None) -> Finding:
    promise = "no process that sees plaintext can run programs, write files or talk to others"
    if daemon is None:
        return Finding(promise=promise, grade="broken", evidence="the daemon is gone")
    gaps = [
        f"{name}: {gap}"
        for name, report in (("daemon", status.daemon), ("worker", status.workers))
        if report is not None and report.sandbox is not None
        for gap in report.sandbox.gaps
    ]
    evidence = (
        f"daemon: seccomp {'filters' if daemon.seccomp_filtered else 'does not filter'}, "
        f"no_new_privs {'is set' if daemon.no_new_privileges else 'is not set'}"
    )
    if daemon.seccomp_filtered and daemon.no_new_privileges and not gaps:
        return Finding(promise=promise, grade="good", evidence=f"{evidence}; Landlock in force")
    return Finding(
        promise=promise,
        grade="weak",
        evidence="; ".join((evidence, *gaps)),
        todo="use a kernel with seccomp and Landlock (lsm=landlock,...)",
    )


def _environment(status: MountStatus) -> Finding:
    promise = "the daemon has no AWS credentials"
    try:
        names = sorted(n for n in procfs.environment_names(status.daemon_pid) if "AWS" in n)
    except OSError as error:
        return Finding(
            promise=promise,
            grade="weak",
            evidence=f"its environment: {error.strerror}",
            todo="look as root",
        )
    if names:
        return Finding(
            promise=promise,
            grade="broken",
            evidence=f"{', '.join(names)} are set",
            todo=_OUR_FAULT,
        )
    return Finding(promise=promise, grade="good", evidence="no AWS variable in its environment")


def _hibernation(status: MountStatus) -> Finding:
    promise = "no plaintext is written by hibernation"
    if not procfs.can_hibernate():
        return Finding(promise=promise, grade="good", evidence="the machine cannot hibernate")
    if status.ram is None and status.plaintext_in == ("memfd_secret",):
        return Finding(promise=promise, grade="good", evidence="memfd_secret in use prevents it")
    return Finding(
        promise=promise,
        grade="weak",
        evidence="the machine can hibernate",
        todo="systemctl mask hibernate.target, or boot with nohibernate",
    )


def _freed_pages() -> Finding:
    promise = "memory that processes give back is zeroed"
    if procfs.zeroes_freed_pages():
        return Finding(promise=promise, grade="good", evidence="init_on_free is on")
    return Finding(
        promise=promise,
        grade="weak",
        evidence="init_on_free is off: memory of workers that ended is not zeroed",
        todo="boot with init_on_free=1",
    )


def _credentials(status: MountStatus) -> Finding:
    promise = "credentials are those of a role"
    source = status.credential_source
    if source in _STATIC_SOURCES:
        return Finding(
            promise=promise,
            grade="weak",
            evidence=f"they come from {source}",
            todo="give this machine or service a role",
        )
    return Finding(promise=promise, grade="good", evidence=f"source: {source or 'not used yet'}")


def _keys(status: MountStatus) -> Finding:
    promise = "only named keys decrypt"
    if not status.key_ids:
        return Finding(
            promise=promise, grade="weak", evidence="any key is accepted", todo="name the keys"
        )
    return Finding(promise=promise, grade="good", evidence=", ".join(status.key_ids))


def _magic_of(mountpoint: str) -> str:
    """Kind of the filesystem that programs see, by the number that statfs(2) has for it."""
    fd = os.open(mountpoint, os.O_PATH | os.O_CLOEXEC)
    try:
        magic = libc.filesystem_magic(fd)
    finally:
        os.close(fd)
    return f"{_FILESYSTEMS.get(magic, 'an unknown filesystem')} ({magic:#x})"


def _has_memfd_secret() -> bool:
    try:
        os.close(libc.memfd_secret())
    except OSError:
        return False
    return True
