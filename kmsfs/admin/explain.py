"""Tells what the last open of one file met, in the daemon: from what is remembered; never KMS."""

from typing import Literal

from kmsfs.admin.status import FileReport
from kmsfs.errors import (
    CiphertextInvalid,
    KmsfsError,
    NameConflict,
    NotBound,
    SourceMissing,
    UsageInvalid,
)
from kmsfs.settings import MountConfig
from kmsfs.store.history import Failure, boot_clock_s
from kmsfs.store.source import SourceDirectory, SourceFile
from kmsfs.store.volume import Volume

State = Literal["served", "stale", "failing", "not asked for", "locked"]


def problem_of(volume: Volume, file: SourceFile) -> KmsfsError | None:
    """What keeps a file from being served whatever KMS says, as far as its outside tells."""
    if file.rivals:
        return NameConflict(f"claimed by {', '.join((file.source_path, *file.rivals))}")
    if file.problem:
        return CiphertextInvalid(file.problem)
    if not file.bound and not volume.may_be_unbound(file):
        return NotBound("it is not bound to its place, and binding is required")
    return None


async def gather(
    config: MountConfig,
    volume: Volume,
    path: str,
    *,
    in_ram_since_s: float | None,
    credential_source: str | None,
) -> FileReport:
    """What is remembered of the file at a path.

    Args:
        in_ram_since_s: when the ramfs view last decrypted what it shows there, on the clock that
            runs from boot; None if it shows nothing.

    Raises:
        SourceMissing: nothing is served there; says why, if its source tells.
        UsageInvalid: a directory is.
    """
    file = await volume.node_at(path)
    if isinstance(file, SourceDirectory):
        raise UsageInvalid(f"{path or 'the mountpoint'} is a directory", hint="name a file in it")
    if file is None:
        raise await _missing(volume, path)
    history = volume.history
    now = boot_clock_s()
    problem = problem_of(volume, file)
    opening = history.openings.get(path)
    failure = history.failures.get(path) or (opening.failure if opening is not None else None)
    if problem is not None:
        failure = Failure.of(problem)
    success = history.success_of(file)
    held = any(entry.path == path and entry.current for entry in volume.cache.held())
    shown = in_ram_since_s is not None if config.view == "ramfs" else held or failure is None
    state: State
    if volume.cache.locked:
        state = "locked"
    elif failure is None:
        state = "served" if success is not None or in_ram_since_s is not None else "not asked for"
    else:
        state = "stale" if shown else "failing"
    decrypted_at_s = success.at_s if success is not None else in_ram_since_s
    call = failure.call if failure is not None else None
    return FileReport(
        path=path,
        mountpoint=config.mountpoint,
        view=config.view,
        state=state,
        error="" if failure is None else failure.error,
        detail="" if failure is None else failure.detail,
        hint="" if failure is None else failure.hint,
        error_age_s=None if failure is None or problem is not None else now - failure.at_s,
        format=file.format if success is None else success.format,
        version=None if success is None else success.bound_version,
        key_arn=None if success is None else success.key_arn,
        decrypted_age_s=None if decrypted_at_s is None else now - decrypted_at_s,
        opened_age_s=None if opening is None else now - opening.at_s,
        from_cache=opening is not None and opening.from_cache,
        held=held or in_ram_since_s is not None,
        call=call if call is not None or success is None else success.call,
        credential_source=credential_source,
    )


async def _missing(volume: Volume, path: str) -> SourceMissing:
    for ignored, reason in (await volume.survey()).ignored:
        if ignored == path:
            return SourceMissing(f"{path} is not served: {reason}")
    return SourceMissing(f"{path} is not served", hint="see `kmsfs status`")
