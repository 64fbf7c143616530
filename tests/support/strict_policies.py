"""Key policies as KMS evaluates them: from the IAM User Guide, "Policy evaluation logic" and
"IAM JSON policy elements", and the AWS KMS Developer Guide, "Key policies in AWS KMS" and
"Condition keys for AWS KMS".
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.strict_identities import Identity
from tests.support.strict_model import error

Statement = Mapping[str, Any]

# AWS KMS Developer Guide, "Resource quotas": key policy document size.
MAX_POLICY_BYTES = 32 << 10

_VERSIONS = ("2012-10-17", "2008-10-17")

_PRINCIPAL = re.compile(r"arn:aws:(?:iam|sts)::([0-9]{12}):(root|user/.+|role/.+|assumed-role/.+)")
_ACCOUNT = re.compile(r"[0-9]{12}")

_ELEMENTS = {
    "Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource",
    "Condition",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a policy is held against.

    Attributes:
        action: such as `Decrypt`; of ReEncrypt it is `ReEncryptFrom` or `ReEncryptTo`.
        context: the encryption context that this action has to do with.
        facts: further condition keys and their values.
    """

    identity: Identity
    action: str
    context: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, str]:
        """Condition keys, in small letters as they are compared, and what the request has."""
        found = {f"kms:EncryptionContext:{key}": value for key, value in self.context.items()}
        found["kms:CallerAccount"] = found["aws:PrincipalAccount"] = self.identity.account
        found["aws:PrincipalArn"] = self.identity.role_arn or self.identity.arn
        return {key.lower(): value for key, value in {**found, **self.facts}.items()}


@dataclass(frozen=True)
class Verdict:
    """What a key policy says of a request.

    Attributes:
        denied: by an explicit Deny.
        granted: to the identity itself.
        delegated: to its account, whose IAM policies decide then.
    """

    denied: bool = False
    granted: bool = False
    delegated: bool = False


def parse_policy(text: str, exists: Callable[[str], bool]) -> tuple[Statement, ...]:
    """The statements of a policy document that KMS accepts.

    Args:
        exists: whether there is a role or user of this ARN.

    Raises:
        ServiceError: MalformedPolicyDocumentException, LimitExceededException.
    """
    if len(text.encode()) > MAX_POLICY_BYTES:
        raise error("LimitExceededException", "The key policy is too long")
    try:
        document = json.loads(text)
    except ValueError:
        raise _malformed("Policy is not valid JSON") from None
    if not isinstance(document, dict) or document.get("Version") not in _VERSIONS:
        raise _malformed("Policy contains no valid Version")
    if document.keys() - {"Version", "Id", "Statement"}:
        raise _malformed("Policy contains an unknown element")
    statements = _many(document.get("Statement"))
    if not statements:
        raise _malformed("Policy contains no statement")
    sids = [statement["Sid"] for statement in statements if "Sid" in statement]
    if len(set(sids)) != len(sids):
        raise _malformed("Statement IDs (SID) in a single policy must be unique.")
    for statement in statements:
        _check_statement(statement, exists)
    return tuple(statements)


def evaluate(statements: Iterable[Statement], request: Request) -> Verdict:
    """What the statements say of a request for the key that they belong to."""
    denied = granted = delegated = False
    for statement in statements:
        if not _acts(statement, request.action) or not _holds(statement, request):
            continue
        whom = _match_principal(statement, request.identity)
        if statement["Effect"] == "Deny":
            denied = denied or whom is not None
        else:
            granted = granted or whom == "identity"
            delegated = delegated or whom == "account"
    return Verdict(denied, granted, delegated)


def _check_statement(statement: Statement, exists: Callable[[str], bool]) -> None:
    if statement.keys() - _ELEMENTS or statement.get("Effect") not in ("Allow", "Deny"):
        raise _malformed("Policy contains an invalid statement")
    principal = statement.get("Principal")
    if principal != "*" and not (isinstance(principal, dict) and principal):
        raise _malformed("A statement contains no principal")
    for name in _principals(statement):
        found = _PRINCIPAL.fullmatch(name)
        whole = name == "*" or _ACCOUNT.fullmatch(name) or (found and found[2] == "root")
        if not whole and not (found and exists(name)):
            raise _malformed("Policy contains a statement with one or more invalid principals.")
    for operator, wanted in statement.get("Condition", {}).items():
        if operator not in _OPERATORS or not isinstance(wanted, dict):
            raise _malformed(f"Invalid Condition type : {operator}.")


def _acts(statement: Statement, action: str) -> bool:
    # Without an action or a resource a statement has no effect, and is accepted all the same.
    actions = _many(statement.get("Action"))
    if "*" not in _many(statement.get("Resource")):
        return False
    return any(fnmatch.fnmatchcase(f"kms:{action}".lower(), each.lower()) for each in actions)


def _match_principal(statement: Statement, identity: Identity) -> str | None:
    """`identity` or `account`, by which of them the statement names; None for neither."""
    own = {identity.arn, identity.role_arn, "*"}
    names = set(_principals(statement))
    if names & own:
        return "identity"
    account = {identity.account, f"arn:aws:iam::{identity.account}:root"}
    return "account" if names & account else None


def _holds(statement: Statement, request: Request) -> bool:
    values = request.values()
    return all(
        _OPERATORS[operator](values.get(key.lower()), [_text(value) for value in _many(wanted)])
        for operator, conditions in statement.get("Condition", {}).items()
        for key, wanted in conditions.items()
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# A condition key that the request does not have fits no value, and every negation.
_OPERATORS: Mapping[str, Callable[[str | None, list[str]], bool]] = {
    "StringEquals": lambda value, wanted: value in wanted,
    "StringNotEquals": lambda value, wanted: value not in wanted,
    "StringLike": lambda value, wanted: (
        value is not None and any(fnmatch.fnmatchcase(value, each) for each in wanted)
    ),
    "Bool": lambda value, wanted: value in wanted,
    "Null": lambda value, wanted: ("true" if value is None else "false") in wanted,
}


def _principals(statement: Statement) -> list[str]:
    principal = statement["Principal"]
    return ["*"] if principal == "*" else _many(principal.get("AWS"))


def _many(value: Any) -> list[Any]:
    """IAM takes one of something for a list of it."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _malformed(what: str) -> Exception:
    return error("MalformedPolicyDocumentException", what)
