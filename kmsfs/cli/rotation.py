"""`reencrypt` and `migrate`."""

import math
import time
from datetime import datetime

import click

from kmsfs.cli import messages
from kmsfs.cli.options import (
    AwsOptions,
    any_key_option,
    aws_options,
    encryption_context_option,
    force_option,
    key_id_option,
)
from kmsfs.errors import ExitCode

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE|DIR...")
@key_id_option
@click.option("--dry-run", is_flag=True, help="Only say what would be re-encrypted.")
@click.option(
    "--written-before",
    type=click.DateTime([_TIME_FORMAT, "%Y-%m-%d"]),
    metavar="TIME",
    help="Skip files written at that local time or later, such as 2026-01-31T08:00:00.",
)
@any_key_option
@encryption_context_option
@aws_options
def reencrypt(
    aws: AwsOptions,
    *,
    files: tuple[str, ...],
    key_id: str | None,
    dry_run: bool,
    written_before: datetime | None,
    any_key: bool,
    encryption_context: dict[str, str],
) -> ExitCode:
    """Encrypt files anew: under --key-id, or else under their key's newest material.

    Of directories all ciphertext is taken, 8 calls to KMS at a time. Bound files stay bound and
    their version rises; permissions, owner and extended attributes stay. Bare blobs are
    re-encrypted by KMS, which shows their plaintext to nobody. A file is replaced after the new
    one was verified.

    A run that was stopped goes on with the same command: files that are under --key-id are
    skipped. Without --key-id nothing tells old from new but the time: give the time at which the
    first run began as --written-before.
    """
    from kmsfs.cli.bulk import work_on
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.keys import KeyOptions, prepare_for_fork
    from kmsfs.manage.plan import plan_in_place
    from kmsfs.manage.reencrypt import ReencryptOptions, check_new_key, reencrypt_work

    # A file may have been written in this second before now.
    began_at = math.ceil(time.time())
    protect_process()
    options = ReencryptOptions(
        key_id=key_id,
        keys=KeyOptions(
            any_key=any_key,
            encryption_context=encryption_context,
            profile=aws.profile,
            region=aws.region,
            endpoint_url=aws.endpoint_url,
        ),
        dry_run=dry_run,
        written_before=None if written_before is None else written_before.timestamp(),
    )
    plan = plan_in_place(files)
    check_new_key(files, options)
    if not dry_run:
        prepare_for_fork(plan.outputs, options.keys)
    again = "the same command goes on where this one stopped"
    if key_id is None and written_before is None:
        since = time.strftime(_TIME_FORMAT, time.localtime(began_at))
        again = f"add --written-before {since} to go on where this one stopped"
    tally = work_on(
        plan.names,
        lambda gate: reencrypt_work(plan, options, gate),
        doing="re-encrypting",
        done_word="to be re-encrypted" if dry_run else "re-encrypted",
        passed_over=plan.passed_over,
        again=again,
    )
    return tally.status(len(plan.jobs))


@click.command()
@click.argument("directory", metavar="[DIR]", default=".")
@key_id_option
@click.option("--dry-run", is_flag=True, help="Only say what would be bound.")
@encryption_context_option
@force_option
@aws_options
def migrate(
    aws: AwsOptions,
    *,
    directory: str,
    key_id: str | None,
    dry_run: bool,
    encryption_context: dict[str, str],
    force: bool,
) -> ExitCode:
    """Bind the unbound files of a volume to their places, and take them out of unbound.

    Bare blobs and Encryption SDK messages in DIR that the volume's unbound patterns name become
    messages bound to their places, under the volume's first key or --key-id. Each is verified
    before it replaces the old one. Then the patterns that match no unbound file any more are
    removed from kmsfs.toml. --force also binds files that no pattern names.

    The same command goes on where one was stopped; until it is done, every file is served.
    """
    from kmsfs.cli.bulk import work_on
    from kmsfs.cli.protection import protect_process
    from kmsfs.errors import KmsfsError
    from kmsfs.manage.keys import KeyOptions, prepare_for_fork
    from kmsfs.manage.migrate import MigrateOptions, forget_unbound, migrate_work, plan_migration

    protect_process()
    keys = KeyOptions(
        encryption_context=encryption_context,
        profile=aws.profile,
        region=aws.region,
        endpoint_url=aws.endpoint_url,
    )
    options = MigrateOptions(key_id=key_id, keys=keys, dry_run=dry_run, force=force)
    volume, plan = plan_migration(directory)
    if not dry_run:
        prepare_for_fork(plan.outputs, keys)
    tally = work_on(
        plan.names,
        lambda gate: migrate_work(plan, volume, options, gate),
        doing="binding",
        done_word="to be bound" if dry_run else "bound",
        passed_over=plan.passed_over,
    )
    if dry_run:
        return tally.status(len(plan.jobs))
    try:
        for path, pattern in forget_unbound(volume):
            messages.summary(f"{pattern!r} is taken out of unbound in {path}")
    except KmsfsError as error:
        messages.failure(error)
        return ExitCode.SOME_FAILED
    return tally.status(len(plan.jobs))
