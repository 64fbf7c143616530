"""Who may do what with a key: key policies and IAM policies, built without asking AWS.

Three kinds of principals. Readers decrypt, writers encrypt, both in the encryption context of
one volume alone; admins administer the key and use it without that bound, since editing and
changing keys decrypt what lies there and encrypt it anew. The account itself keeps
administration, which its IAM policies hand out, so that no policy made here locks it out; it gets
no use of the key. Nobody gets CreateGrant: grants let somebody in whom no policy shows.

Elements, actions and condition keys are those of the AWS KMS Developer Guide, "Key policies in
AWS KMS", "Permissions reference" and "Condition keys for AWS KMS".
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kmsfs.config import VOLUME_NAME
from kmsfs.errors import UsageInvalid
from kmsfs.formats.binding import VOLUME_KEY
from kmsfs.manage.input import check_utf8

Policy = dict[str, Any]
"""A policy document, or a statement of one."""

MAX_POLICY_BYTES: Final = 32 << 10
"""Of a key policy: AWS KMS Developer Guide, "Resource quotas"."""

# What may be done with a key beside using it, but for CreateGrant.
_ADMINISTRATION: Final = (
    "kms:CreateAlias",
    "kms:Describe*",
    "kms:Enable*",
    "kms:List*",
    "kms:Put*",
    "kms:Update*",
    "kms:Revoke*",
    "kms:Disable*",
    "kms:Get*",
    "kms:Delete*",
    "kms:TagResource",
    "kms:UntagResource",
    "kms:ScheduleKeyDeletion",
    "kms:CancelKeyDeletion",
    "kms:RotateKeyOnDemand",
)
_REPLICATION: Final = ("kms:ReplicateKey",)
_READING: Final = ("kms:Decrypt",)
_WRITING: Final = ("kms:Encrypt", "kms:GenerateDataKey")
_RE_ENCRYPTING: Final = ("kms:ReEncryptFrom", "kms:ReEncryptTo")

# IAM User Guide, "IAM identifiers"; partitions are aws, aws-cn, aws-us-gov and the like.
_PRINCIPAL: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/[\w+=,.@/-]+", re.ASCII)
_KEY_ARN: Final = re.compile(r"arn:(aws[a-z-]*):kms:([a-z0-9-]+):([0-9]{12}):key/((mrk-)?[^/:]+)")

_CONTEXT_CONDITION: Final = "kms:EncryptionContext:"


@dataclass(frozen=True, slots=True)
class Account:
    """An AWS account, in the partition that it lies in (`aws`, `aws-cn`, ...)."""

    number: str
    partition: str


@dataclass(frozen=True, slots=True)
class Principals:
    """Who is let in, by ARN: readers and writers are roles, admins roles or users."""

    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    admins: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what KMS would not take, or would take for more than one identity.

        Raises:
            UsageInvalid: not the ARN of a role, or for admins of a role or user.
        """
        for option, arns, kinds in (
            ("--reader", self.readers, ("role",)),
            ("--writer", self.writers, ("role",)),
            ("--admin", self.admins, ("role", "user")),
        ):
            for arn in arns:
                found = _PRINCIPAL.fullmatch(arn)
                if found is None or found[1] not in kinds:
                    wanted = " or ".join(f"arn:aws:iam::ACCOUNT:{kind}/NAME" for kind in kinds)
                    raise UsageInvalid(
                        f"{option} {arn!r} is not the ARN of a {' or '.join(kinds)}",
                        hint=f"it has the form {wanted}",
                    )


@dataclass(frozen=True, slots=True)
class KeyName:
    """A key ARN, taken apart."""

    arn: str
    account: Account
    multi_region: bool

    @property
    def everywhere(self) -> str:
        """The key with its replicas in other regions, as the resource of an IAM policy."""
        if not self.multi_region:
            return self.arn
        parts = self.arn.split(":")
        parts[3] = "*"
        return ":".join(parts)


def key_name(arn: str) -> KeyName:
    """Take a key ARN apart.

    Raises:
        UsageInvalid: an alias, a bare key id, or no ARN at all.
    """
    found = _KEY_ARN.fullmatch(arn)
    if found is None:
        raise UsageInvalid(
            f"{arn!r} is not the ARN of a key, so its account is not known",
            hint="name the key by its ARN, as `kmsfs init` stores it",
        )
    return KeyName(arn, Account(found[3], found[1]), multi_region=found[5] is not None)


def volume_pairs(volume: str, context: Mapping[str, str]) -> dict[str, str]:
    """The encryption context that readers and writers are bound to.

    Raises:
        UsageInvalid: not a volume's name; a pair that contradicts it, or that IAM would read
            as something else than this text.
    """
    if not VOLUME_NAME.fullmatch(volume):
        raise UsageInvalid(
            f"{volume!r} is not a volume's name",
            hint="name it with --volume: letters, digits, dot, dash and underscore, 64 at most",
        )
    if context.get(VOLUME_KEY, volume) != volume:
        raise UsageInvalid(
            f"the context names volume {context[VOLUME_KEY]!r}, and the volume is {volume!r}"
        )
    pairs = {VOLUME_KEY: volume, **context}
    for text in (*pairs, *pairs.values()):
        check_utf8(text, "context")
        if "${" in text:
            raise UsageInvalid(f"IAM would take {text!r} for a policy variable")
    if len({key.lower() for key in pairs}) != len(pairs):
        # Condition keys are not case sensitive, the encryption context is.
        raise UsageInvalid("IAM does not tell two keys of a context apart by their case")
    return pairs


def key_policy(
    account: Account, principals: Principals, pairs: Mapping[str, str], *, multi_region: bool
) -> Policy:
    """The policy of a key.

    Args:
        account: the key's own.
        pairs: see `volume_pairs`.
        multi_region: whether its administrators may make replicas of it.

    Raises:
        UsageInvalid: more principals than a key policy has room for.
    """
    administration = _administration(multi_region=multi_region)
    root = f"arn:{account.partition}:iam::{account.number}:root"
    statements = [_for("AccountAdministers", [root], _allow(administration))]
    if principals.admins:
        statements += [
            _for("AdminsAdminister", principals.admins, _allow(administration)),
            _for("AdminsUse", principals.admins, _allow((*_READING, *_WRITING, *_RE_ENCRYPTING))),
        ]
    if principals.writers:
        write, re_encrypt = _writing(pairs)
        statements += [
            _for("WritersEncrypt", principals.writers, write),
            _for("WritersReEncryptInPlace", principals.writers, re_encrypt),
        ]
    if principals.readers:
        statements.append(_for("ReadersDecrypt", principals.readers, _reading(pairs)))
    policy = _document(statements)
    if len(policy_text(policy)) > MAX_POLICY_BYTES:
        raise UsageInvalid(
            f"the key policy would be larger than {MAX_POLICY_BYTES} bytes", hint="name fewer roles"
        )
    return policy


def iam_policies(keys: Sequence[KeyName], pairs: Mapping[str, str]) -> dict[str, Policy]:
    """Policies to attach to roles: under `reader`, `writer` and `admin`.

    Roles of a key's own account need none beside its key policy, but for administering aliases,
    which have no policies of their own; roles of other accounts need both.
    """
    key_arns = [key.everywhere for key in keys]
    multi_region = any(key.multi_region for key in keys)
    # KMS authorizes what makes, changes or deletes an alias on the alias too.
    aliases = [f"{key.everywhere.rpartition(':key/')[0]}:alias/*" for key in keys]
    administration = _allow(_administration(multi_region=multi_region))
    use = _allow((*_READING, *_WRITING, *_RE_ENCRYPTING))
    return {
        "reader": _document([_on("Decrypt", key_arns, _reading(pairs))]),
        "writer": _document(
            [
                _on(sid, key_arns, statement)
                for sid, statement in zip(
                    ("Encrypt", "ReEncryptInPlace"), _writing(pairs), strict=True
                )
            ]
        ),
        "admin": _document(
            [
                _on("Administer", list(dict.fromkeys([*key_arns, *aliases])), administration),
                _on("Use", key_arns, use),
            ]
        ),
    }


def policy_text(policy: Policy) -> str:
    """A policy as KMS takes it: JSON, in ASCII since it takes no more than Latin-1."""
    return json.dumps(policy, separators=(",", ":"))


def _administration(*, multi_region: bool) -> tuple[str, ...]:
    return (*_ADMINISTRATION, *_REPLICATION) if multi_region else _ADMINISTRATION


def _reading(pairs: Mapping[str, str]) -> Policy:
    return _allow(_READING, {"StringEquals": _equals(pairs)})


def _writing(pairs: Mapping[str, str]) -> tuple[Policy, Policy]:
    """Encrypting, and encrypting anew.

    ReEncrypt is authorized twice, on the key and context it decrypts under and on those it
    encrypts under. To another key it would be Decrypt by a detour: that key may be one whose
    policy lets the writer decrypt.
    """
    same_key = {"Bool": {"kms:ReEncryptOnSameKey": "true"}}
    bound = {"StringEquals": _equals(pairs)}
    return _allow(_WRITING, bound), _allow(_RE_ENCRYPTING, {**bound, **same_key})


def _equals(pairs: Mapping[str, str]) -> dict[str, str]:
    return {_CONTEXT_CONDITION + key: value for key, value in pairs.items()}


def _allow(actions: Sequence[str], condition: Policy | None = None) -> Policy:
    statement: Policy = {"Effect": "Allow", "Action": list(actions)}
    return statement if condition is None else {**statement, "Condition": condition}


def _for(sid: str, principals: Sequence[str], statement: Policy) -> Policy:
    """A statement of a key policy, in which `*` is the key itself."""
    whom = {"AWS": list(dict.fromkeys(principals))}
    return _ordered({"Sid": sid, "Principal": whom, "Resource": "*", **statement})


def _on(sid: str, resources: Sequence[str], statement: Policy) -> Policy:
    """A statement of an IAM policy."""
    return _ordered({"Sid": sid, "Resource": list(resources), **statement})


def _ordered(statement: Policy) -> Policy:
    """In the order in which AWS shows a statement."""
    order = ("Sid", "Effect", "Principal", "Action", "Resource", "Condition")
    return {name: statement[name] for name in order if name in statement}


def _document(statements: Sequence[Policy]) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}
