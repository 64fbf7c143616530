"""`kmsfs status`, `lock`, `unlock` and `refresh`: talk to running mounts."""

import os
import sys
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import json_option
from kmsfs.errors import ControlUnavailable, ExitCode, KmsfsError, UsageInvalid

if TYPE_CHECKING:
    from kmsfs.admin.security import SecurityReport
    from kmsfs.admin.status import MountStatus, NamedProblem, UnattendedStatus
    from kmsfs.views.mountpoint import Mount


@click.command()
@click.argument("mountpoint", type=click.Path(), required=False)
@click.option(
    "--security", is_flag=True, help="Show how well each promise holds, with its evidence."
)
@click.option(
    "--metrics", is_flag=True, help="Write counters and gauges, in the text format of Prometheus."
)
@json_option
def status(mountpoint: str | None, *, security: bool, metrics: bool, as_json: bool) -> int:
    """Show what is served, ignored, unbound, failing, cached, stale and locked.

    Without MOUNTPOINT, every mount that answers this user is shown. Metrics are those of the
    mounts, with kmsfs_up 0 for one that does not answer; counters begin with its daemon.
    """
    import msgspec

    from kmsfs.cli import mounts
    from kmsfs.cli.status_text import as_text

    if metrics and (security or as_json):
        other = "--security" if security else "--json"
        raise UsageInvalid(f"--metrics and {other} contradict each other")
    found = [mounts.find(mountpoint)] if mountpoint is not None else mounts.find_all()
    if metrics:
        return _write_metrics(found, only=mountpoint is not None)
    records: list[MountStatus | UnattendedStatus | SecurityReport] = []
    failed = False
    for mount in found:
        try:
            records.append(_security_of(mount) if security else _look_at(mount))
        except KmsfsError as error:
            if mountpoint is not None:
                raise
            messages.failure(error, about=mount.mountpoint)
            failed = True
    if as_json:
        encoded = msgspec.json.encode(records if mountpoint is None else records[0])
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
    else:
        click.echo("\n".join(as_text(record) for record in records), nl=False)
        if not found:
            click.echo("nothing is mounted")
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


def _write_metrics(found: "list[Mount]", *, only: bool) -> int:
    """Write the metrics of mounts, also where one does not answer: that is one of them.

    Args:
        only: whether it is one that the user named.
    """
    from kmsfs.cli.status_metrics import Silent, as_exposition
    from kmsfs.views.mountpoint import FS_TYPE

    records: list[MountStatus | UnattendedStatus | Silent] = []
    exit_code = ExitCode.DONE
    for mount in found:
        try:
            records.append(_look_at(mount))
        except KmsfsError as error:
            messages.failure(error, about=mount.mountpoint)
            view = "fuse" if mount.fs_type == FS_TYPE else "ramfs"
            records.append(Silent(mountpoint=mount.mountpoint, view=view))
            exit_code = error.exit_code if only else ExitCode.SOME_FAILED
    click.echo(as_exposition(records), nl=False)
    return exit_code


def _look_at(mount: "Mount") -> "MountStatus | UnattendedStatus":
    from kmsfs.admin.status import UnattendedStatus
    from kmsfs.views.mountpoint import RAM_SOURCE_PREFIX, is_ram_of_ours

    try:
        return _status_of(mount)
    except ControlUnavailable:
        if os.geteuid() != 0 or not is_ram_of_ours(mount):
            raise
        source = mount.source.removeprefix(RAM_SOURCE_PREFIX)
        return UnattendedStatus(mountpoint=mount.mountpoint, source=source)


def _security_of(mount: "Mount") -> "SecurityReport":
    from kmsfs.admin.security import assess

    return assess(_status_of(mount), mount.device)


def _status_of(mount: "Mount") -> "MountStatus":
    from kmsfs.admin import control

    answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
    assert isinstance(answer, control.StatusAnswer)
    return answer.status


@click.command()
@click.argument("mountpoint", type=click.Path())
def lock(mountpoint: str) -> int:
    """Wipe every plaintext of MOUNTPOINT, end what could hold a copy, and refuse to open files.

    Files that are open stay open and cannot be read any more, also after unlock. The ramfs view
    is emptied; what programs hold of it they can read until they close it. Programs that have
    files open or mapped are named. SIGUSR1 to the mount's first process does the same.
    """
    from kmsfs.admin import control
    from kmsfs.cli import mounts
    from kmsfs.views.mountpoint import FS_TYPE

    mount = mounts.find(mountpoint)
    answer = control.call(mount.device, os.geteuid(), control.LockRequest())
    assert isinstance(answer, control.Locked)
    click.echo(f"locked: {_plaintexts(answer.wiped - len(answer.held))} wiped")
    if mount.fs_type == FS_TYPE:
        mounts.warn_of_stale(mount)
    mounts.warn_of_held({file.old_path: file.path for file in answer.held})
    return ExitCode.SOME_FAILED if answer.held else ExitCode.DONE


@click.command()
@click.argument("mountpoint", type=click.Path())
def unlock(mountpoint: str) -> int:
    """Let files of MOUNTPOINT be opened again after lock; the ramfs view is filled again."""
    from kmsfs.admin import control
    from kmsfs.cli import mounts

    answer = control.call(mounts.find(mountpoint).device, os.geteuid(), control.UnlockRequest())
    assert isinstance(answer, control.Unlocked)
    _name_failing(answer.missing)
    if not answer.filled:
        messages.warning("the ramfs is still being filled: see `kmsfs status`")
    return ExitCode.SOME_FAILED if answer.missing else ExitCode.DONE


@click.command()
@click.argument("path", type=click.Path(), required=False)
@click.option(
    "--accept-older",
    is_flag=True,
    help="Serve what lies at PATH now, though a newer version was served before.",
)
def refresh(path: str | None, *, accept_older: bool) -> int:
    """Read again what is served at PATH, a file or directory of a mount or its mountpoint.

    Without PATH, every mount of this user is read again. The FUSE view wipes what it holds, and
    KMS is asked at the next open; the ramfs view asks KMS now. Files that are open keep the
    version they were opened with.
    """
    from kmsfs.admin import control
    from kmsfs.cli import mounts

    if path is None and accept_older:
        raise UsageInvalid(
            "--accept-older needs a PATH", hint="a mountpoint stands for all that is in it"
        )
    found = [mounts.find_below(path)] if path is not None else [(m, "") for m in mounts.find_all()]
    failed = False
    for mount, below in found:
        request = control.RefreshRequest(path=below, accept_older=accept_older)
        try:
            answer = control.call(mount.device, os.geteuid(), request)
        except KmsfsError as error:
            if path is not None:
                raise
            messages.failure(error, about=mount.mountpoint)
            failed = True
            continue
        assert isinstance(answer, control.Refreshed)
        _name_failing(answer.failed)
        if not answer.finished:
            messages.error(f"{mount.mountpoint}: KMS could not be asked for all files in time")
        failed = failed or bool(answer.failed) or not answer.finished
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


def _name_failing(files: "tuple[NamedProblem, ...]") -> None:
    for item in files:
        messages.error(f"{item.path}: {item.reason}")
        if item.hint:
            messages.hint(item.hint)


def _plaintexts(count: int) -> str:
    return "1 plaintext" if count == 1 else f"{count} plaintexts"
