"""Who signs requests to the strict stand-in, and whether they signed correctly."""

import base64
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from xml.sax.saxutils import escape

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from tests.support.strict_model import error


@dataclass(eq=False)
class Identity:
    """Who signs requests: a user, or a role that was taken on.

    Attributes:
        session_token: required in requests if set.
        expired: answer ExpiredTokenException from now on.
    """

    account: str
    name: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expired: bool = False
    role_arn: str | None = None

    @classmethod
    def user(cls, name: str, account: str) -> "Identity":
        """A user with a new access key."""
        return cls(account, name, _access_key_id("AKIA"), secrets.token_urlsafe(30))

    @classmethod
    def assumed(cls, role_arn: str, session_name: str) -> "Identity":
        """A role that was taken on just now."""
        return cls(
            role_arn.split(":")[4],
            session_name,
            _access_key_id("ASIA"),
            secrets.token_urlsafe(30),
            session_token=secrets.token_urlsafe(60),
            role_arn=role_arn,
        )

    @property
    def arn(self) -> str:
        """As it stands in refusals."""
        if self.role_arn is not None:
            role = self.role_arn.rpartition("/")[2]
            return f"arn:aws:sts::{self.account}:assumed-role/{role}/{self.name}"
        return f"arn:aws:iam::{self.account}:user/{self.name}"


@dataclass(frozen=True)
class Signature:
    """The Authorization header of a request, taken apart."""

    access_key_id: str
    region: str
    service: str
    signed_headers: tuple[str, ...]
    value: str = field(repr=False)


def read_signature(headers: Mapping[str, str], service: str) -> Signature:
    """What a request says of its signer.

    Raises:
        ServiceError: it says nothing, or not enough.
    """
    authorization = headers.get("authorization")
    if authorization is None:
        raise error("MissingAuthenticationTokenException", "Missing Authentication Token")
    scheme, _, rest = authorization.partition(" ")
    fields = dict(item.strip().split("=", 1) for item in rest.split(",") if "=" in item)
    scope = fields.get("Credential", "").split("/")
    if scheme != "AWS4-HMAC-SHA256" or len(scope) != 5 or scope[3] != service:
        raise error("IncompleteSignature", "Authorization header is not complete")
    names = tuple(fields.get("SignedHeaders", "").split(";"))
    if not {"host", "x-amz-date"} <= set(names) <= headers.keys():
        raise error("IncompleteSignature", "Authorization header is not complete")
    return Signature(scope[0], scope[2], scope[3], names, fields.get("Signature", ""))


def verify_signature(
    signature: Signature, identity: Identity, headers: Mapping[str, str], body: bytes
) -> None:
    """Sign what was received once more and compare.

    Raises:
        ServiceError: InvalidSignatureException.
    """
    when = headers["x-amz-date"]
    signed_at = datetime.strptime(when, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if abs(datetime.now(UTC) - signed_at) > timedelta(minutes=5):
        raise error("InvalidSignatureException", f"Signature not yet current or expired: {when}")
    request = botocore.awsrequest.AWSRequest(
        "POST",
        f"http://{headers['host']}/",
        {name: headers[name] for name in signature.signed_headers},
        body,
    )
    request.context["timestamp"] = when
    credentials = botocore.credentials.Credentials(
        identity.access_key_id, identity.secret_access_key, identity.session_token
    )
    signer = botocore.auth.SigV4Auth(credentials, signature.service, signature.region)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    if not secrets.compare_digest(signer.signature(text, request), signature.value):
        raise error(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided.",
        )


def assume_role_answer(identity: Identity, lifetime_s: float, request_id: str) -> bytes:
    """What STS answers to AssumeRole."""
    return (
        '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>'
        f"<AssumedRoleUser><AssumedRoleId>AROA:{escape(identity.name)}</AssumedRoleId>"
        f"<Arn>{escape(identity.arn)}</Arn></AssumedRoleUser><Credentials>"
        f"<AccessKeyId>{identity.access_key_id}</AccessKeyId>"
        f"<SecretAccessKey>{identity.secret_access_key}</SecretAccessKey>"
        f"<SessionToken>{identity.session_token}</SessionToken>"
        f"<Expiration>{expiration(lifetime_s)}</Expiration></Credentials></AssumeRoleResult>"
        f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>"
        "</AssumeRoleResponse>"
    ).encode()


def caller_identity_answer(identity: Identity, request_id: str) -> bytes:
    """What STS answers to GetCallerIdentity."""
    return (
        '<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        f"<GetCallerIdentityResult><Arn>{escape(identity.arn)}</Arn>"
        f"<UserId>{identity.access_key_id}</UserId><Account>{identity.account}</Account>"
        f"</GetCallerIdentityResult><ResponseMetadata><RequestId>{request_id}</RequestId>"
        "</ResponseMetadata></GetCallerIdentityResponse>"
    ).encode()


def sts_error_answer(code: str, message: str | None, request_id: str) -> bytes:
    """What STS answers when it refuses."""
    return (
        f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code>"
        f"<Message>{escape(message or '')}</Message></Error>"
        f"<RequestId>{request_id}</RequestId></ErrorResponse>"
    ).encode()


def container_answer(identity: Identity, lifetime_s: float) -> dict[str, str]:
    """What the metadata service of a container answers."""
    return {
        "AccessKeyId": identity.access_key_id,
        "SecretAccessKey": identity.secret_access_key,
        "Token": identity.session_token or "",
        "Expiration": expiration(lifetime_s),
    }


def expiration(lifetime_s: float) -> str:
    """A time from now, as AWS writes it."""
    return (datetime.now(UTC) + timedelta(seconds=lifetime_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _access_key_id(prefix: str) -> str:
    return prefix + base64.b32encode(os.urandom(10)).decode()
