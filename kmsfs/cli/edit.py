"""`kmsfs edit`."""

import os
import sys

import click

from kmsfs.cli import messages
from kmsfs.cli.options import (
    AwsOptions,
    any_key_option,
    aws_options,
    encryption_context_option,
    key_ids_option,
)
from kmsfs.errors import KmsfsError


@click.command()
@click.argument("file")
@key_ids_option
@any_key_option
@encryption_context_option
@aws_options
def edit(
    aws: AwsOptions,
    *,
    file: str,
    key_ids: tuple[str, ...],
    any_key: bool,
    encryption_context: dict[str, str],
) -> None:
    """Edit the plaintext of FILE with $VISUAL or $EDITOR, and encrypt it again.

    The plaintext lies in a ramfs that only this command and the editor see, and every other
    filesystem is read-only for the editor: swap files, backups and history stay in the ramfs,
    which is wiped. FILE stays under its key and encryption context; it is replaced when it was
    changed and the editor ended with 0. This needs root, and the permission to encrypt and to
    decrypt.
    """
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.edit import edit_file, editor_of
    from kmsfs.manage.keys import KeyOptions

    protect_process()
    options = KeyOptions(
        key_ids=key_ids,
        any_key=any_key,
        encryption_context=encryption_context,
        profile=aws.profile,
        region=aws.region,
        endpoint_url=aws.endpoint_url,
    )
    changed = edit_file(
        file,
        options,
        editor=editor_of(os.environ),
        environment=os.environ,
        ask_again=_ask_again,
    )
    click.echo(messages.printable(f"{file}: {'encrypted again' if changed else 'not changed'}"))


def _ask_again(error: KmsfsError) -> bool:
    if not sys.stdin.isatty():
        return False
    messages.failure(error)
    return click.confirm(
        "Edit it once more? What was changed is lost otherwise.", default=True, err=True
    )
