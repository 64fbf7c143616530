"""`kmsfs check`: whether a directory of ciphertext can be served, before it is."""

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import click

from kmsfs.cli import messages
from kmsfs.cli.options import (
    AwsOptions,
    any_key_option,
    aws_options,
    encryption_context_option,
    json_option,
    key_ids_option,
)
from kmsfs.errors import ControlUnavailable, ExitCode, MountpointUnusable, UsageInvalid

if TYPE_CHECKING:
    from kmsfs.manage.check import Problem
    from kmsfs.views.mountpoint import Mount

_DAY_S: Final = 86400.0


@click.command()
@click.argument("directory", metavar="[DIR|MOUNTPOINT]", default=".")
@click.option("--decrypt", is_flag=True, help="Decrypt every file; nothing of it is shown.")
@click.option(
    "--content", is_flag=True, help="Read files through the mount, and check keys and certificates."
)
@click.option(
    "--max-age", type=click.IntRange(min=0), metavar="DAYS", help="Fail older ciphertext."
)
@click.option(
    "--expires-within",
    type=click.IntRange(min=0, max=36500),
    default=0,
    metavar="DAYS",
    help="With --content: fail certificates that expire so soon.",
)
@key_ids_option
@any_key_option
@encryption_context_option
@json_option
@aws_options
def check(
    aws: AwsOptions,
    *,
    directory: str,
    decrypt: bool,
    content: bool,
    max_age: int | None,
    expires_within: int,
    key_ids: tuple[str, ...],
    any_key: bool,
    encryption_context: dict[str, str],
    as_json: bool,
) -> ExitCode:
    """Check that a directory's files can be served, and that its keys decrypt them.

    DIR is a volume or a directory in it, or else --key-id names the keys; of a MOUNTPOINT it is
    what is mounted there. Each file is held against the rules of a mount: format, binding, size,
    key. KMS is asked once for each key whether it would decrypt for this identity, without a
    plaintext being made (DryRun).

    With --content, for a MOUNTPOINT only, PEM files are read: certificates that have expired, and
    private keys that do not belong to the certificate in the same file, in one beside it of the
    same name, or in the only one beside it.

    The status is 0 if all is well and 1 if something is not; each is named.
    """
    from kmsfs.cli import check_text
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.check import check_directory
    from kmsfs.manage.input import absolute
    from kmsfs.manage.keys import KeyOptions

    if expires_within and not content:
        raise UsageInvalid("--expires-within needs --content")
    mount = _mount_at(directory)
    if content and mount is None:
        raise UsageInvalid(
            f"{directory} is not a mountpoint, and --content reads through a mount",
            hint="mount it first: `kmsfs mount`",
        )
    protect_process()
    source = absolute(directory)
    if mount is not None:
        mounted, mounted_keys = _source_of(mount)
        source = absolute(mounted)
        key_ids = key_ids or (() if any_key else mounted_keys)
    found = check_directory(
        source,
        KeyOptions(
            key_ids=key_ids,
            any_key=any_key,
            encryption_context=encryption_context,
            profile=aws.profile,
            region=aws.region,
            endpoint_url=aws.endpoint_url,
        ),
        decrypt=decrypt,
        max_age_s=None if max_age is None else max_age * _DAY_S,
    )
    contents = None
    if content and mount is not None:
        from kmsfs.manage.check_content import check_content

        contents = check_content(
            mount.mountpoint,
            [file.path for file in found.files if file.problem is None],
            now=datetime.now(UTC),
            expires_within=timedelta(days=expires_within),
        )
    click.echo(
        check_text.as_json_text(found, contents) if as_json else check_text.as_text(found, contents)
    )
    problems = check_text.problems(found, contents)
    _say(problems)
    if not found.files:
        messages.warning(f"{found.source} has no file to serve")
    return ExitCode.SOME_FAILED if problems else ExitCode.DONE


def _mount_at(directory: str) -> "Mount | None":
    from kmsfs.cli import mounts

    try:
        return mounts.find(directory)
    except MountpointUnusable:
        return None


def _source_of(mount: "Mount") -> tuple[str, tuple[str, ...]]:
    """What is mounted, and the keys it is mounted with, if its process tells."""
    from kmsfs.admin import control
    from kmsfs.views.mountpoint import RAM_SOURCE_PREFIX, is_ram_of_ours

    try:
        answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
    except ControlUnavailable:
        if not is_ram_of_ours(mount):
            raise
        return mount.source.removeprefix(RAM_SOURCE_PREFIX), ()
    assert isinstance(answer, control.StatusAnswer)
    return answer.status.source, answer.status.key_ids


def _say(problems: "list[tuple[str, Problem]]") -> None:
    """Name each; a hint that is the same for several stands below the last of them."""
    for number, (about, problem) in enumerate(problems, start=1):
        messages.error(f"{about}: {problem.detail}")
        same_follows = number < len(problems) and problems[number][1].hint == problem.hint
        if problem.hint and not same_follows:
            messages.hint(problem.hint)
