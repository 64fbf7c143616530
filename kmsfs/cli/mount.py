"""`kmsfs mount` and `kmsfs umount`."""

import contextlib
import errno
import os
import select
import signal
import socket
from typing import TYPE_CHECKING

import click

from kmsfs.cli.options import (
    AwsOptions,
    any_key_option,
    aws_options,
    encryption_context_option,
    key_ids_option,
)
from kmsfs.errors import ControlUnavailable, MountpointUnusable

if TYPE_CHECKING:
    from kmsfs.settings import MountConfig
    from kmsfs.views.serving import HeldFile

# Unmounting includes wiping; a daemon that takes longer is reported, not waited for. Nor is one
# that has been killed by now and cannot end.
_END_S = 20.0
_KILLED_S = 10.0


@click.command()
@click.argument("source", type=click.Path())
@click.argument("mountpoint", type=click.Path(), required=False)
@key_ids_option
@any_key_option
@encryption_context_option
@click.option("--owner", metavar="USER", help="Owner of files and directories: name or number.")
@click.option("--group", metavar="GROUP", help="Group of files and directories: name or number.")
@click.option("--mode", metavar="OCTAL", help="Permissions of files; 0400 by default.")
@click.option("--dir-mode", metavar="OCTAL", help="Permissions of directories; 0555 by default.")
@click.option(
    "--view",
    type=click.Choice(["fuse", "ramfs", "auto"]),
    help="How to serve the files; auto takes a ramfs where FUSE cannot be used.",
)
@click.option(
    "--ram",
    type=click.Choice(["ramfs", "tmpfs"]),
    help="What the ramfs view fills; a tmpfs must be mounted with noswap.",
)
@click.option("--allow-swap", is_flag=True, help="Fill a tmpfs that can be swapped out, too.")
@click.option("--require-all", is_flag=True, help="Mount only if every file decrypts.")
@click.option("--wait", is_flag=True, help="Return only when what prefetch names is decrypted.")
@click.option("--strict", is_flag=True, help="Mount only if every promise holds in full.")
@click.option("--user", metavar="NAME", help="Have the daemon run as this unprivileged user.")
@click.option("--once", is_flag=True, help="Fill a ramfs and leave it, with no process behind.")
@click.option("--no-restart", is_flag=True, help="Leave the mount dead when its daemon dies.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option("--debug", is_flag=True, help="Log more; content is never logged.")
@click.option(
    "-o",
    "option_texts",
    multiple=True,
    metavar="OPTIONS",
    help="Mount options as in mount(8): each option above by its name with underscores, "
    "allow_other, and those that mount passes along.",
)
@aws_options
def mount(
    aws: AwsOptions,
    *,
    source: str,
    mountpoint: str | None,
    key_ids: tuple[str, ...],
    any_key: bool,
    encryption_context: dict[str, str],
    owner: str | None,
    group: str | None,
    mode: str | None,
    dir_mode: str | None,
    view: str | None,
    ram: str | None,
    allow_swap: bool,
    require_all: bool,
    wait: bool,
    strict: bool,
    user: str | None,
    once: bool,
    no_restart: bool,
    foreground: bool,
    debug: bool,
    option_texts: tuple[str, ...],
) -> int:
    """Serve the ciphertext files of SOURCE as plain files at MOUNTPOINT.

    Returns when the mount is ready, or says why it is not. Files are decrypted when they are
    first opened, into locked memory; in the ramfs view all of them at mount, into a ramfs. The
    status is 1 if some of these could not be. Without MOUNTPOINT, SOURCE is the NAME of a file
    /etc/kmsfs/NAME.toml, which says what is mounted where.
    """
    from kmsfs.cli.mount_report import MountReport
    from kmsfs.launcher import launch

    def make_config() -> "MountConfig":
        from kmsfs.manage.keys import KeyOptions
        from kmsfs.manage.mounting import MountOptions, mount_config, with_option_text

        options = MountOptions(
            keys=KeyOptions(
                key_ids=key_ids,
                any_key=any_key,
                encryption_context=encryption_context,
                profile=aws.profile,
                region=aws.region,
                endpoint_url=aws.endpoint_url,
            ),
            owner=owner,
            group=group,
            mode=mode,
            dir_mode=dir_mode,
            view=view,
            ram=ram,
            allow_swap=allow_swap,
            require_all=require_all,
            wait=wait,
            strict=strict,
            user=user,
            debug=debug,
            once=once,
            no_restart=no_restart,
        )
        for text in option_texts:
            options = with_option_text(options, text)
        if mountpoint is not None:
            return mount_config(source, mountpoint, options)
        from kmsfs.manage.configuration import named_mount

        return mount_config(*named_mount(source), options)

    with MountReport() as report:
        status = launch(make_config, foreground=foreground, tell=report.tell)
    return status or report.status


@click.command()
@click.argument("mountpoint", type=click.Path())
def umount(mountpoint: str) -> None:
    """Unmount MOUNTPOINT, and return when every plaintext is wiped.

    A ramfs that was mounted before kmsfs filled it is emptied and stays mounted.
    """
    from kmsfs.admin import control
    from kmsfs.cli.mounts import find
    from kmsfs.launcher.mounting import take_away_ram
    from kmsfs.views import mountpoint as mounts

    found = find(mountpoint)
    path = found.mountpoint
    connection: socket.socket | None = None
    with contextlib.suppress(ControlUnavailable):
        connection = control.connect(found.device, os.geteuid())
    try:
        if connection is not None and not mounts.is_ours(found):
            _end_launcher(connection)
        elif connection is None and found.fs_type != mounts.FS_TYPE:
            _warn_of_held(take_away_ram(found))
        else:
            mounts.unmount(path, lazy=connection is None and mounts.is_dead(path))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise MountpointUnusable(f"unmounting {path}: {error.strerror}") from error
        raise MountpointUnusable(
            f"{path} is busy: {_who(found)}",
            hint="end them first; `kmsfs lock` wipes every plaintext at once, "
            "and `umount -l` unmounts when they are done",
        ) from error
    if connection is not None:
        with connection:
            _await_end(connection, path)


def _end_launcher(connection: socket.socket) -> None:
    """Have the launcher, which listens at the other end, take everything away and end."""
    from kmsfs.admin import control

    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, control.UCRED_BYTES)
    launcher_pid, _ = control.parse_credentials(ucred)
    with contextlib.suppress(ProcessLookupError):
        os.kill(launcher_pid, signal.SIGTERM)


def _warn_of_held(held: "list[HeldFile]") -> None:
    from kmsfs.cli.mounts import warn_of_held

    warn_of_held({file.old_path: file.path for file in held})


def _await_end(connection: socket.socket, path: str) -> None:
    """Wait until the launcher, which listens at the other end, has ended."""
    from kmsfs.admin import control, procfs

    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, control.UCRED_BYTES)
    launcher_pid, _ = control.parse_credentials(ucred)
    try:
        pidfd = os.pidfd_open(launcher_pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(_KILLED_S * 1000):
            return
        hint = "it may be mounted elsewhere too: see /proc/*/mountinfo"
        if procfs.is_stuck(launcher_pid):
            hint = "its source does not answer: the kernel keeps who asked it until it does"
        elif poll.poll((_END_S - _KILLED_S) * 1000):
            return
        raise ControlUnavailable(
            f"{path} is unmounted, but process {launcher_pid} has not ended", hint=hint
        )
    finally:
        os.close(pidfd)


def _who(found: object) -> str:
    from kmsfs.views import mountpoint as mounts

    assert isinstance(found, mounts.Mount)
    holders = mounts.holders(found)
    if not holders:
        return "somebody whom this user may not see uses it"
    return ", ".join(f"{holder.name} (pid {holder.pid}) {holder.by}" for holder in holders[:8])
