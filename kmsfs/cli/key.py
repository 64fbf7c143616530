"""`key`: making keys, and the policies that say who may use them."""

import json
import sys
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import click

from kmsfs.cli import messages
from kmsfs.cli.options import AwsOptions, aws_options, context_of

_MAX_NAMED: Final = 8


P = ParamSpec("P")
R = TypeVar("R")


def _principal_options(command: Callable[P, R]) -> Callable[P, R]:
    """`--reader --writer --admin`."""
    for option in reversed(_PRINCIPAL_OPTIONS):
        command = option(command)
    return command


_PRINCIPAL_OPTIONS: Final = (
    click.option(
        "--reader",
        "readers",
        multiple=True,
        metavar="ROLE_ARN",
        help="Role that may decrypt. May be given several times.",
    ),
    click.option(
        "--writer",
        "writers",
        multiple=True,
        metavar="ROLE_ARN",
        help="Role that may encrypt. May be given several times.",
    ),
    click.option(
        "--admin",
        "admins",
        multiple=True,
        metavar="ARN",
        help="Role or user that administers the key and may use it. May be given several times.",
    ),
)


@click.group()
def key() -> None:
    """Make keys, and show who may use them.

    A reader may decrypt, and nothing else. A writer may encrypt, and nothing else. Both are
    bound to one volume: the encryption context has to name it, as that of every file does that
    `kmsfs encrypt` binds. An admin administers the key and may decrypt and encrypt in every
    context: editing files and changing a volume's keys need that. The account keeps
    administration of the key, which its IAM policies hand out, but not its use.
    """


@key.command(short_help="Make a KMS key with a policy of least privilege.")
@click.option("--alias", required=True, metavar="NAME", help="What the key is called.")
@_principal_options
@click.option("--volume", metavar="NAME", help="The volume it is for; else called as the alias.")
@click.option(
    "--context",
    multiple=True,
    metavar="K=V",
    callback=context_of,
    help="Further pair that readers and writers must have in the encryption context. May be given "
    "several times.",
)
@click.option("--multi-region", is_flag=True, help="Make a key that other regions can replicate.")
@aws_options
def create(
    aws: AwsOptions,
    *,
    alias: str,
    readers: tuple[str, ...],
    writers: tuple[str, ...],
    admins: tuple[str, ...],
    volume: str | None,
    context: dict[str, str],
    multi_region: bool,
) -> None:
    """Make a KMS key with rotation on and a policy of least privilege; show its ARN.

    Give each pair of --context as encryption_context under [kms] in the volume's kmsfs.toml too:
    files are written with it then. Files that --unbound or --raw of `kmsfs encrypt` made name no
    volume: readers cannot decrypt them. Bare blobs that `aws kms encrypt` wrote with
    kmsfs:volume=NAME in their context they can, given the same as --encryption-context.

    Needs kms:CreateKey, kms:CreateAlias, kms:DescribeKey, kms:EnableKeyRotation and
    kms:PutKeyPolicy.
    """
    from kmsfs.keys import loggers
    from kmsfs.manage.key_policy import Principals
    from kmsfs.manage.keys import KeyOptions, settings_for
    from kmsfs.manage.new_key import create_key, plan_key

    plan = plan_key(
        alias,
        volume=volume,
        context=context,
        principals=Principals(readers, writers, admins),
        multi_region=multi_region,
    )
    settings = settings_for(
        None,
        KeyOptions(profile=aws.profile, region=aws.region, endpoint_url=aws.endpoint_url),
    )
    # Botocore is imported here: what is refused before does not wait for it.
    from kmsfs.keys.aws_admin import AwsKeyAdmin

    loggers.silence()
    click.echo(create_key(plan, AwsKeyAdmin(settings, plan.alias)))
    if not admins:
        messages.hint(
            "no --admin was named: nobody may edit files or change keys, since readers only "
            "decrypt and writers only encrypt"
        )


@key.command(short_help="Show the policies for a volume's keys and roles, offline.")
@click.argument("directory", metavar="[DIR]", default=".")
@_principal_options
def policy(
    *,
    directory: str,
    readers: tuple[str, ...],
    writers: tuple[str, ...],
    admins: tuple[str, ...],
) -> None:
    """Show the policy of each key of a volume, and IAM policies for its roles, as JSON.

    DIR is the volume, or a directory in it; the working directory if it is left out. What is
    shown follows from its kmsfs.toml and its files: AWS is not asked. Without --reader, the
    volume's role_arn is the reader. Roles of another account than the key's need the IAM policy
    beside the key policy.
    """
    from kmsfs.manage.input import absolute
    from kmsfs.manage.key_policy import Principals
    from kmsfs.manage.volume_policy import volume_policies

    found = volume_policies(absolute(directory), Principals(readers, writers, admins))
    shown = {"volume": found.volume, "keys": found.keys, "iam": found.iam}
    sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    for path in found.outside[:_MAX_NAMED]:
        messages.warning(f"{path}: its encryption context is not the volume's")
    if len(found.outside) > _MAX_NAMED:
        messages.warning(f"so it is with {len(found.outside) - _MAX_NAMED} other files")
    if found.outside:
        messages.hint(
            "readers cannot decrypt these under this policy: decrypt each as admin, and encrypt "
            "it again with `kmsfs encrypt`"
        )
