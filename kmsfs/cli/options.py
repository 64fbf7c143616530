"""Options that mean the same in every command."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class AwsOptions:
    """`--profile --region --endpoint-url`, as given; None where not."""

    profile: str | None
    region: str | None
    endpoint_url: str | None


def context_of(
    ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    """The encryption context that `K=V` texts stand for; a value may hold further `=`."""
    context: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not key or not value:
            raise click.BadParameter(f"{pair!r} is not of the form K=V.", ctx, param)
        if key in context:
            raise click.BadParameter(f"{key!r} is given twice.", ctx, param)
        context[key] = value
    return context


def _non_empty(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...] | str | None
) -> tuple[str, ...] | str | None:
    for value in values if isinstance(values, tuple) else (values,):
        if value is not None and not value.strip():
            raise click.BadParameter("a key id cannot be empty.", ctx, param)
    return values


key_ids_option = click.option(
    "--key-id",
    "key_ids",
    multiple=True,
    metavar="KEY",
    callback=_non_empty,
    help="KMS key: ARN, alias or id. May be given several times.",
)

key_id_option = click.option(
    "--key-id", metavar="KEY", callback=_non_empty, help="KMS key: ARN, alias or id."
)

encryption_context_option = click.option(
    "--encryption-context",
    multiple=True,
    metavar="K=V",
    callback=context_of,
    help="Pair of the encryption context. May be given several times.",
)

any_key_option = click.option(
    "--any-key", is_flag=True, help="Accept whichever key a file was encrypted under."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON.")

recursive_option = click.option(
    "-r", "--recursive", is_flag=True, help="Take all files of directories."
)

force_option = click.option("--force", is_flag=True, help="Do it all the same.")


def aws_options(
    command: Callable[Concatenate[AwsOptions, P], R],
) -> Callable[P, R]:
    """`--profile --region --endpoint-url`, handed to the command as one `AwsOptions` in front."""

    @click.option("--profile", help="Profile of the AWS configuration.")
    @click.option("--region", help="AWS region, for keys that are not given as an ARN.")
    @click.option("--endpoint-url", metavar="URL", help="Address of KMS, if not AWS's own.")
    @wraps(command)
    def with_aws_options(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = {field.name: kwargs.pop(field.name) for field in fields(AwsOptions)}
        return command(AwsOptions(**given), *args, **kwargs)

    return with_aws_options
