"""`encrypt`, `decrypt` and `inspect`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import (
    AwsOptions,
    any_key_option,
    aws_options,
    encryption_context_option,
    force_option,
    json_option,
    key_id_option,
    key_ids_option,
    recursive_option,
)
from kmsfs.errors import ExitCode, KmsfsError, OutputUnwritable, UsageInvalid

if TYPE_CHECKING:
    from kmsfs.manage.encrypt_file import EncryptOptions
    from kmsfs.manage.inspect import Inspection
    from kmsfs.manage.keys import KeyOptions


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", metavar="OUT", help="A file, or a directory to put files in.")
@click.option("--path", metavar="PATH", help="Served path of what standard input (-) holds.")
@key_id_option
@encryption_context_option
@click.option("--raw", is_flag=True, help="Write bare KMS blobs (4096 bytes at most).")
@click.option("--unbound", is_flag=True, help="Bind to no volume and path.")
@recursive_option
@force_option
@aws_options
def encrypt(
    aws: AwsOptions,
    *,
    files: tuple[str, ...],
    output: str | None,
    path: str | None,
    key_id: str | None,
    encryption_context: dict[str, str],
    raw: bool,
    unbound: bool,
    recursive: bool,
    force: bool,
) -> ExitCode:
    """Encrypt files, each into FILE.encrypted beside it.

    What is written is an AWS Encryption SDK message with key commitment and signature, bound to
    its volume and path. The key is --key-id, or else the first of the volume's key_ids. The
    plaintext is left alone. FILE may be - for standard input.

    With -r FILE may be a directory: all files below it are encrypted, 8 calls to KMS at a time,
    beside each or at the same relative paths below -o OUT. Ciphertext, and files whose output is
    there already, are skipped, so that the same command goes on where one was stopped. Symbolic
    links are not followed.
    """
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.encrypt_file import EncryptOptions, encrypt_file
    from kmsfs.manage.input import STANDARD_INPUT
    from kmsfs.manage.keys import KeyOptions, KeyServices

    if not recursive and len(files) > 1 and output is not None and not os.path.isdir(output):
        raise UsageInvalid(f"{output} is not a directory, and there are several files")
    if files.count(STANDARD_INPUT) > 1:
        raise UsageInvalid("standard input can be read once")
    protect_process()
    options = EncryptOptions(
        output=output,
        path=path,
        raw=raw,
        unbound=unbound,
        force=force,
        keys=KeyOptions(
            key_ids=(key_id,) if key_id is not None else (),
            encryption_context=encryption_context,
            profile=aws.profile,
            region=aws.region,
            endpoint_url=aws.endpoint_url,
        ),
    )
    if recursive:
        return _encrypt_trees(files, options)
    services = KeyServices()
    failures: list[KmsfsError] = []
    left_alone: list[str] = []
    for name in files:
        try:
            done = encrypt_file(name, options, services)
        except KmsfsError as error:
            messages.failure(error, about=_shown(name))
            failures.append(error)
            continue
        if name != STANDARD_INPUT:
            left_alone.append(name)
        click.echo(messages.printable(os.path.relpath(done.output)))
        for warning, hint in done.warnings:
            messages.warning(f"{done.output}: {warning}")
            messages.hint(hint)
    if left_alone:
        what = left_alone[0] if len(left_alone) == 1 else f"{len(left_alone)} files"
        _say_left_alone(what)
    return _status_of(failures, len(files))


def _encrypt_trees(names: tuple[str, ...], options: "EncryptOptions") -> ExitCode:
    from kmsfs.cli.bulk import work_on
    from kmsfs.manage.encrypt_tree import encrypt_work, plan_encryption
    from kmsfs.manage.keys import prepare_for_fork

    if options.path is not None:
        raise UsageInvalid("--path names standard input; files have their own names")
    plan = plan_encryption(names, options.output)
    prepare_for_fork(plan.outputs, options.keys)
    tally = work_on(
        plan.names,
        lambda gate: encrypt_work(plan, options, gate),
        doing="encrypting",
        done_word="encrypted",
        passed_over=plan.passed_over,
    )
    if tally.done:
        _say_left_alone("1 file" if tally.done == 1 else f"{tally.done} files")
    return tally.status(len(plan.jobs))


def _say_left_alone(what: str) -> None:
    messages.hint(f"the plaintext of {what} is left alone: remove it when it is not needed")


@click.command()
@click.argument("file")
@click.option("-o", "--output", metavar="OUT", help="A file, or a directory to put it in.")
@click.option("--path", metavar="PATH", help="Served path of what standard input (-) holds.")
@key_ids_option
@any_key_option
@encryption_context_option
@recursive_option
@force_option
@aws_options
def decrypt(
    aws: AwsOptions,
    *,
    file: str,
    output: str | None,
    path: str | None,
    key_ids: tuple[str, ...],
    any_key: bool,
    encryption_context: dict[str, str],
    recursive: bool,
    force: bool,
) -> ExitCode:
    """Decrypt FILE to standard output.

    The keys that may be asked are those given with --key-id, or else the volume's. FILE may be -
    for standard input.

    With -r FILE is a directory: every ciphertext below it is decrypted to its served path below
    -o OUT, which must lie on a ramfs or on a tmpfs mounted with noswap; --force takes any.
    """
    if recursive and (output is None or path is not None or file == "-"):
        raise UsageInvalid("-r takes a directory and needs one to put files in: -o OUT")
    if output is None and sys.stdout.isatty() and not force:
        raise UsageInvalid(
            "standard output is a terminal",
            hint="send the plaintext to a program, or add --force to show it",
        )
    from kmsfs.cli.protection import protect_process
    from kmsfs.manage.decrypt import decrypt_file, output_path
    from kmsfs.manage.keys import KeyOptions
    from kmsfs.manage.output import (
        check_output,
        directory_lies_on_disk,
        lies_on_disk,
        write_file,
    )

    protect_process()
    options = KeyOptions(
        key_ids=key_ids,
        any_key=any_key,
        encryption_context=encryption_context,
        profile=aws.profile,
        region=aws.region,
        endpoint_url=aws.endpoint_url,
    )
    if recursive:
        assert output is not None
        return _decrypt_tree(file, output, options, force=force)
    try:
        target = output_path(file, path, output) if output is not None else None
        if target is not None:
            check_output(target, replace=force)
        with decrypt_file(file, path, options) as plaintext:
            if plaintext.warning:
                messages.warning(f"{_shown(file)}: {plaintext.warning}")
            if target is not None:
                write_file(target, plaintext.content, replace=force)
                on_disk = directory_lies_on_disk(target.parent)
            else:
                _write_standard_output(plaintext.content)
                on_disk = lies_on_disk(sys.stdout.fileno())
    except KmsfsError as error:
        messages.failure(error, about=_shown(file))
        return error.exit_code
    if on_disk:
        where = target if target is not None else "standard output"
        messages.warning(f"{where} lies on disk, and holds plaintext now")
    return ExitCode.DONE


def _decrypt_tree(directory: str, output: str, options: "KeyOptions", *, force: bool) -> ExitCode:
    from kmsfs.cli.bulk import work_on
    from kmsfs.manage.decrypt_tree import decrypt_work, plan_decryption
    from kmsfs.manage.input import absolute
    from kmsfs.manage.keys import prepare_for_fork
    from kmsfs.manage.output import directory_lies_on_disk

    plan = plan_decryption(directory, output, force=force)
    prepare_for_fork([absolute(name) for name in plan.names[:1]], options)
    tally = work_on(
        plan.names,
        lambda gate: decrypt_work(plan, options, gate, force=force),
        doing="decrypting",
        done_word="decrypted",
        passed_over=plan.passed_over,
        again="add --force to replace what was decrypted so far",
    )
    if tally.done and directory_lies_on_disk(Path(output)):
        messages.warning(f"{output} lies on disk, and holds plaintext now")
    return tally.status(len(plan.jobs))


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
def inspect(files: tuple[str, ...], as_json: bool) -> ExitCode:
    """Show what files say of themselves: format, key, context, size. Offline.

    Nothing shown is authenticated before the file is decrypted. The status is 3 if a file is of
    no known format, or is damaged in a way that shows without its key.
    """
    from kmsfs.cli.inspection import as_json_text, as_text
    from kmsfs.manage.inspect import inspect_file

    found: list[Inspection] = []
    failures: list[KmsfsError] = []
    for name in files:
        try:
            found.append(inspect_file(name))
        except KmsfsError as error:
            messages.failure(error, about=name)
            failures.append(error)
    if as_json:
        click.echo(as_json_text(found))
    elif found:
        click.echo("\n\n".join(as_text(inspection) for inspection in found))
    if any(inspection.problem is not None for inspection in found):
        return ExitCode.NOT_AUTHENTIC
    return _status_of(failures, len(files))


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


def _status_of(failures: list[KmsfsError], count: int) -> ExitCode:
    """One thing's failure has its own status; of several, only that some failed."""
    if not failures:
        return ExitCode.DONE
    return failures[0].exit_code if count == 1 else ExitCode.SOME_FAILED


def _write_standard_output(content: memoryview) -> None:
    # Straight from the buffer that is wiped: sys.stdout would keep copies.
    sys.stdout.flush()
    rest = content
    try:
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputUnwritable(f"standard output: {error.strerror}") from error
