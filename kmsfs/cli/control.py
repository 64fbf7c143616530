"""`kmsfs status`, `kmsfs lock` and `kmsfs unlock`: talk to running mounts."""

import os
import sys
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import json_option
from kmsfs.errors import ControlUnavailable, ExitCode

if TYPE_CHECKING:
    from kmsfs.admin.status import MountStatus, RamStatus, UnattendedStatus


@click.command()
@click.argument("mountpoint", type=click.Path(), required=False)
@json_option
def status(mountpoint: str | None, as_json: bool) -> int:
    """Show what is served, ignored, unbound, failing, cached and locked.

    Without MOUNTPOINT, every mount that answers this user is shown.
    """
    import msgspec

    from kmsfs.admin import control
    from kmsfs.admin.status import UnattendedStatus
    from kmsfs.cli import mounts
    from kmsfs.views.mountpoint import RAM_SOURCE_PREFIX, is_ram_of_ours

    found = [mounts.find(mountpoint)] if mountpoint is not None else mounts.find_all()
    answers: list[MountStatus | UnattendedStatus] = []
    failed = False
    for mount in found:
        try:
            answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
        except ControlUnavailable as error:
            if is_ram_of_ours(mount) and os.geteuid() == 0:
                source = mount.source.removeprefix(RAM_SOURCE_PREFIX)
                answers.append(UnattendedStatus(mountpoint=mount.mountpoint, source=source))
                continue
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
            text = _unattended(record) if isinstance(record, UnattendedStatus) else _as_text(record)
            click.echo(("\n" if index else "") + text, nl=False)
        if not found:
            click.echo("nothing is mounted")
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


@click.command()
@click.argument("mountpoint", type=click.Path())
def lock(mountpoint: str) -> int:
    """Wipe every plaintext of MOUNTPOINT, end what could hold a copy, and refuse to open files.

    Files that are open stay open and cannot be read any more, also after unlock. The ramfs view
    is emptied; what programs hold of it they can read until they close it, and they are named.
    """
    from kmsfs.admin import control
    from kmsfs.cli import mounts

    answer = control.call(mounts.find(mountpoint).device, os.geteuid(), control.LockRequest())
    assert isinstance(answer, control.Locked)
    click.echo(f"locked: {_plaintexts(answer.wiped - len(answer.held))} wiped")
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
    for item in answer.missing:
        messages.error(f"{item.path}: {item.reason}")
        if item.hint:
            messages.hint(item.hint)
    if not answer.filled:
        messages.warning("the ramfs is still being filled: see `kmsfs status`")
    return ExitCode.SOME_FAILED if answer.missing else ExitCode.DONE


def _unattended(record: "UnattendedStatus") -> str:
    lines = (
        f"{record.mountpoint}: {record.source} ({record.view} view)",
        "  state    filled and left: no process keeps it in step with the source",
    )
    return "".join(messages.printable(line) + "\n" for line in lines)


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
    if record.view_reason:
        lines.insert(1, f"  view     ramfs, since FUSE cannot be used: {record.view_reason}")
    if record.ram is not None:
        lines[-1:] = _ram_lines(record.ram)
    lines += [
        f"    {entry.path}: {entry.size_bytes} bytes, {entry.age_s:.0f} s old"
        + (", open" if entry.open_by else "")
        + (f" {entry.open_by} times" if entry.open_by > 1 else "")
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
    memory = ", ".join(record.plaintext_in) or ("none held" if record.ram is None else "ramfs")
    lines.append(f"  memory   {memory}")
    credentials = record.credential_source or "not looked for yet"
    lines.append(f"  keys     {', '.join(record.key_ids) or 'any'} (credentials: {credentials})")
    lines += [f"  weaker   {text}" for text in record.weaknesses]
    return "".join(messages.printable(line) + "\n" for line in lines)


def _ram_lines(ram: "RamStatus") -> list[str]:
    used = f"{ram.size_bytes} of {ram.limit_bytes} bytes"
    lines = [f"  {ram.kind:8} {_files(ram.files)}, {used}, decrypted at mount and at each change"]
    if ram.stale:
        lines.append(f"  stale    {_files(len(ram.stale))}, kept until KMS can be asked again")
        lines += [f"    {item.path}: {item.reason}" for item in ram.stale]
    if ram.held:
        lines.append(f"  held     {_files(len(ram.held))}, taken away and open in a program")
        lines += [f"    {item.path}" for item in ram.held]
    return lines


def _plaintexts(count: int) -> str:
    return "1 plaintext" if count == 1 else f"{count} plaintexts"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
