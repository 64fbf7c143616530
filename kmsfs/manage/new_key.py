"""Making a key: policy, rotation and alias, in an order that leaves nothing unsaid."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from kmsfs.errors import KmsAnswerInvalid, KmsfsError, KmsUnreachable, OutputExists, UsageInvalid
from kmsfs.formats.esdk import RESERVED_CONTEXT_PREFIX
from kmsfs.manage.key_policy import Account, Principals, key_policy, policy_text, volume_pairs

_PREFIX: Final = "alias/"

# Of the context that kmsfs writes itself.
_OWN_PREFIX: Final = "kmsfs:"

# KMS API Reference, CreateAlias: AliasName; those under aws/ are AWS's own.
_ALIAS: Final = re.compile(r"alias/(?!aws/)[a-zA-Z0-9/_-]{1,250}")


class KeyAdmin(Protocol):
    """What making a key asks of a key service; errors are those of `kmsfs.errors`."""

    def caller_arn(self) -> str:
        """The ARN of the current identity."""
        ...

    def alias_exists(self) -> bool:
        """Whether the alias stands for a key already."""
        ...

    def create_key(self, *, policy: str, description: str, multi_region: bool) -> str:
        """Make a key and return its ARN."""
        ...

    def enable_rotation(self, key_arn: str) -> None:
        """Have a key's material renewed each year."""
        ...

    def create_alias(self, key_arn: str) -> None:
        """Let the alias stand for a key."""
        ...


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """What is to be made, checked as far as it can be without AWS.

    Attributes:
        alias: begins with `alias/`.
        pairs: see `volume_pairs`.
    """

    alias: str
    volume: str
    pairs: Mapping[str, str]
    principals: Principals
    multi_region: bool


def plan_key(
    alias: str,
    *,
    volume: str | None,
    context: Mapping[str, str],
    principals: Principals,
    multi_region: bool,
) -> KeyPlan:
    """Check what a key is to be.

    Args:
        alias: with or without `alias/`.
        volume: the volume it is for; None for one that is called as the alias.

    Raises:
        UsageInvalid: see `volume_pairs` and `Principals.check`; an alias that KMS does not take;
            a pair that is not the user's to set when files are encrypted.
    """
    alias = _PREFIX + alias.removeprefix(_PREFIX)
    if not _ALIAS.fullmatch(alias):
        raise UsageInvalid(
            f"{alias!r} is not a name for a key",
            hint="letters, digits, slash, underscore and dash; alias/aws/ is kept for AWS",
        )
    for key in context:
        if key.startswith((_OWN_PREFIX, RESERVED_CONTEXT_PREFIX)):
            raise UsageInvalid(
                f"the encryption context key {key!r} is not free to be set",
                hint="the volume is named with --volume",
            )
    principals.check()
    volume = alias.removeprefix(_PREFIX) if volume is None else volume
    return KeyPlan(alias, volume, volume_pairs(volume, context), principals, multi_region)


def create_key(plan: KeyPlan, admin: KeyAdmin) -> str:
    """Make a key with its policy, turn rotation on, give it its alias; return its ARN.

    Raises:
        OutputExists: the alias is taken; nothing was made.
        KmsfsError: as `KeyAdmin` raises. If the key was made before, the error names it and says
            what is left to do.
    """
    caller = admin.caller_arn().split(":")
    account = Account(number=caller[4], partition=caller[1])
    policy = key_policy(account, plan.principals, plan.pairs, multi_region=plan.multi_region)
    if admin.alias_exists():
        raise OutputExists(
            f"{plan.alias} stands for a key already", hint="choose another name with --alias"
        )
    description = f"kmsfs volume {plan.volume}"
    try:
        key_arn = admin.create_key(
            policy=policy_text(policy), description=description, multi_region=plan.multi_region
        )
    except (KmsUnreachable, KmsAnswerInvalid) as error:
        error.hint = (
            f"look whether a key was made all the same (its description is {description!r}) "
            "before you try again"
        )
        raise
    rotate = f"aws kms enable-key-rotation --key-id {key_arn}"
    name = f"aws kms create-alias --alias-name {plan.alias} --target-key-id {key_arn}"
    _finish(lambda: admin.enable_rotation(key_arn), key_arn, left=(rotate, name))
    _finish(lambda: admin.create_alias(key_arn), key_arn, left=(name,))
    return key_arn


def _finish(step: Callable[[], None], key_arn: str, left: tuple[str, ...]) -> None:
    """Take a step with a key that is there now; `left` are commands that would do the rest."""
    made = f"the key {key_arn} was made, but is not finished"
    hint = (
        f"finish it with `{' && '.join(left)}`, or delete it with "
        f"`aws kms schedule-key-deletion --key-id {key_arn}`"
    )
    try:
        step()
    except KmsfsError as error:
        unfinished = type(error)(f"{made}: {error.detail}", hint=hint)
        unfinished.call = error.call
        raise unfinished from error
    except KeyboardInterrupt as interrupt:
        raise KmsUnreachable(f"{made}: interrupted", hint=hint) from interrupt
