"""`init`."""

import click

from kmsfs.cli import messages
from kmsfs.cli.options import AwsOptions, aws_options, force_option, key_ids_option
from kmsfs.errors import UsageInvalid


@click.command()
@click.argument("directory", metavar="DIR")
@key_ids_option
@click.option("--volume", metavar="NAME", help="The volume's name; else the directory's.")
@click.option(
    "--unbound",
    multiple=True,
    metavar="PATTERN",
    help="Served paths that need not be bound. May be given several times.",
)
@force_option
@aws_options
def init(
    aws: AwsOptions,
    *,
    directory: str,
    key_ids: tuple[str, ...],
    volume: str | None,
    unbound: tuple[str, ...],
    force: bool,
) -> None:
    """Make DIR a volume: write DIR/kmsfs.toml.

    Keys are stored as ARNs. Ciphertext that lies in DIR already and is bound to no place is
    listed under unbound, so that it goes on being served.
    """
    import os

    from kmsfs.config_files import check_trusted
    from kmsfs.errors import ConfigUntrusted
    from kmsfs.manage.input import absolute
    from kmsfs.manage.keys import KeyOptions, key_service, settings_for
    from kmsfs.manage.volume import init_volume

    if not key_ids:
        raise UsageInvalid("a volume needs a key", hint="name it with --key-id")
    settings = settings_for(
        None,
        KeyOptions(
            key_ids=key_ids,
            profile=aws.profile,
            region=aws.region,
            endpoint_url=aws.endpoint_url,
        ),
    )
    done = init_volume(
        absolute(directory),
        key_ids=key_ids,
        name=volume,
        unbound=unbound,
        endpoint_url=aws.endpoint_url,
        keys=key_service(settings),
        replace=force,
    )
    click.echo(messages.printable(os.path.relpath(done.path)))
    try:
        check_trusted(done.path, uid=os.geteuid())
    except ConfigUntrusted as error:
        messages.warning(error.detail)
        messages.hint(error.hint)
    for path in done.unlistable:
        messages.warning(f"{path} is not bound, and cannot be listed: its name is not UTF-8")
    if done.found_unbound:
        count = len(done.found_unbound)
        files = "1 file is" if count == 1 else f"{count} files are"
        messages.hint(
            f"{files} not bound to this volume and listed under unbound: bind what belongs "
            f"here with `kmsfs migrate {directory}`"
        )
