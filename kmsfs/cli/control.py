"""`kmsfs status`, `kmsfs lock` and `kmsfs unlock`: talk to running mounts."""

import os
import sys
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import json_option
from kmsfs.errors import ControlUnavailable, ExitCode, MountpointUnusable

if TYPE_CHECKING:
    from kmsfs.admin.status import MountStatus
    from kmsfs.views.mountpoint import Mount


@click.command()
@click.argument("mountpoint", type=click.Path(), required=False)
@json_option
def status(mountpoint: str | None, as_json: bool) -> int:
    """Show what is served, ignored, unbound, failing, cached and locked.

    Without MOUNTPOINT, every mount that answers this user is shown.
    """
    import msgspec

    from kmsfs.admin import control
    from kmsfs.views import mountpoint as mounts

    found = [_find(mountpoint)] if mountpoint is not None else mounts.kmsfs_mounts()
    answers: list[MountStatus] = []
    failed = False
    for mount in {m.device: m for m in found}.values():
        try:
            answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
        except ControlUnavailable as error:
            if mountpoint is not None:
                raise
            messages.failure(error, about=mount.mountpoint)
            failed = True
            continue
        assert isinstance(answer, control.StatusAnswer)
        answers.append(answer.status)
    if as_json:
        encoded = msgspec.json.encode(answers if mountpoint is None else answers[0])
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
    else:
        for index, record in enumerate(answers):
            click.echo(("\n" if index else "") + _as_text(record), nl=False)
        if not found:
            click.echo("nothing is mounted")
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


@click.command()
@click.argument("mountpoint", type=click.Path())
def lock(mountpoint: str) -> None:
    """Wipe every plaintext of MOUNTPOINT, end what could hold a copy, and refuse to open files.

    Files that are open stay open and cannot be read any more, also after unlock.
    """
    from kmsfs.admin import control

    control.call(_find(mountpoint).device, os.geteuid(), control.LockRequest())


@click.command()
@click.argument("mountpoint", type=click.Path())
def unlock(mountpoint: str) -> None:
    """Let files of MOUNTPOINT be opened again after lock."""
    from kmsfs.admin import control

    control.call(_find(mountpoint).device, os.geteuid(), control.UnlockRequest())


def _find(mountpoint: str) -> "Mount":
    from kmsfs.views import mountpoint as mounts

    path = mounts.resolve(mountpoint)
    found = mounts.find_mount(path)
    if found is None or found.fs_type != mounts.FS_TYPE:
        raise MountpointUnusable(f"nothing of kmsfs is mounted at {path}")
    return found


def _as_text(record: "MountStatus") -> str:
    """A mount as lines for a person. Names come from files: they are made printable."""
    volume = f", volume {record.volume}" if record.volume else ""
    used = f"{record.cached_bytes} of {record.budget_bytes}"
    lines = [
        f"{record.mountpoint}: {record.source} ({record.view} view{volume})",
        f"  state    {'LOCKED' if record.locked else 'serving'}",
        f"  served   {_files(record.served)}",
        f"  cached   {_files(len(record.cached))}, {used} bytes",
    ]
    lines += [
        f"    {entry.path}: {entry.size_bytes} bytes, {entry.age_s:.0f} s old"
        + (f", open {entry.open_by} times" if entry.open_by else "")
        for entry in record.cached
    ]
    lines.append(f"  ignored  {_files(record.ignored_count)}")
    lines += [f"    {item.path}: {item.reason}" for item in record.ignored]
    lines.append(f"  unbound  {_files(record.unbound_count)}")
    lines += [f"    {path}" for path in record.unbound]
    lines.append(f"  failing  {_files(len(record.failing))}")
    for item in record.failing:
        lines.append(f"    {item.path}: {item.reason}")
        if item.hint:
            lines.append(f"      hint: {item.hint}")
    memory = ", ".join(record.plaintext_in) or "none held"
    lines.append(f"  memory   {memory}")
    credentials = record.credential_source or "not looked for yet"
    lines.append(f"  keys     {', '.join(record.key_ids) or 'any'} (credentials: {credentials})")
    lines += [f"  weaker   {text}" for text in record.weaknesses]
    return "".join(messages.printable(line) + "\n" for line in lines)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
