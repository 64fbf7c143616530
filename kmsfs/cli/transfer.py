"""`mv` and `cp`."""

import os
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import (
    AwsOptions,
    aws_options,
    encryption_context_option,
    force_option,
    key_id_option,
    recursive_option,
)
from kmsfs.errors import ExitCode

if TYPE_CHECKING:
    from kmsfs.manage.keys import KeyOptions


_as_target_option = click.option(
    "-T",
    "--no-target-directory",
    "as_target",
    is_flag=True,
    help="Take DST for the new name, also where it is a directory.",
)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.argument("target", metavar="DST")
@key_id_option
@encryption_context_option
@_as_target_option
@force_option
@aws_options
def mv(
    aws: AwsOptions,
    *,
    sources: tuple[str, ...],
    target: str,
    key_id: str | None,
    encryption_context: dict[str, str],
    as_target: bool,
    force: bool,
) -> ExitCode:
    """Move ciphertext, within a volume or to another, and bind it to its new place.

    A bound file is decrypted, encrypted anew and verified; SRC is removed once DST is on disk. It
    stays under its key within a volume, and gets the first key of another one, or --key-id. What
    is bound to no place is moved as it is. SRC may be a directory. DST may be one to move into.
    """
    keys = _key_options(aws, encryption_context)
    return _transfer(sources, target, key_id, keys, as_target=as_target, force=force, move=True)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.argument("target", metavar="DST")
@key_id_option
@encryption_context_option
@recursive_option
@_as_target_option
@force_option
@aws_options
def cp(
    aws: AwsOptions,
    *,
    sources: tuple[str, ...],
    target: str,
    key_id: str | None,
    encryption_context: dict[str, str],
    recursive: bool,
    as_target: bool,
    force: bool,
) -> ExitCode:
    """Copy ciphertext, within a volume or to another, and bind the copy to its place.

    As `kmsfs mv`, but SRC stays. With -r it may be a directory.
    """
    keys = _key_options(aws, encryption_context)
    return _transfer(
        sources, target, key_id, keys, as_target=as_target, force=force, recursive=recursive
    )


def _key_options(aws: AwsOptions, encryption_context: dict[str, str]) -> "KeyOptions":
    from kmsfs.manage.keys import KeyOptions

    return KeyOptions(
        encryption_context=encryption_context,
        profile=aws.profile,
        region=aws.region,
        endpoint_url=aws.endpoint_url,
    )


def _transfer(
    sources: tuple[str, ...],
    target: str,
    key_id: str | None,
    keys: "KeyOptions",
    *,
    as_target: bool,
    force: bool,
    move: bool = False,
    recursive: bool = False,
) -> ExitCode:
    from kmsfs.cli.bulk import work_on
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.keys import prepare_for_fork
    from kmsfs.manage.transfer import (
        TransferOptions,
        plan_transfer,
        remove_empty_directories,
        transfer_work,
    )

    protect_process()
    directories = [name for name in sources if os.path.isdir(name) and not os.path.islink(name)]
    new_name = as_target or not os.path.isdir(target)
    plan = plan_transfer(sources, target, recursive=move or recursive, as_target=as_target)
    options = TransferOptions(move=move, key_id=key_id, keys=keys, force=force)
    prepare_for_fork(plan.outputs, keys)
    again = ["give the same command again"]
    if directories and new_name:
        again.append("-T")
    if not move:
        again.append("--force to replace the copies")
    tally = work_on(
        plan.names,
        lambda gate: transfer_work(plan, options, gate),
        doing="moving" if move else "copying",
        done_word="moved" if move else "copied",
        passed_over=plan.passed_over,
        again=" with ".join(again[:2]) + "".join(f" and {more}" for more in again[2:]),
        quiet=not directories and len(sources) == 1,
    )
    if move:
        for left in remove_empty_directories(directories):
            messages.warning(f"{left} is left, with what could not be moved")
    return tally.status(len(plan.jobs))
