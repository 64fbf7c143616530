"""What botocore raises, in the words of `kmsfs.errors`.

Texts of botocore's exceptions may hold parameters, response bodies and URLs with passwords. So
details are made of operation, key id, error code, request id and host name alone, and the
exceptions themselves are not kept as causes.
"""

import contextlib
import re
from collections.abc import Container, Iterator, Mapping
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from kmsfs.errors import (
    CiphertextInvalid,
    ConfigInvalid,
    CredentialsUnavailable,
    IncorrectKey,
    KeyAccessDenied,
    KeyNotFound,
    KeyPolicyRefused,
    KeyUnusable,
    KmsAnswerInvalid,
    KmsfsError,
    KmsThrottled,
    KmsUnreachable,
    OutputExists,
    RegionUnknown,
    UsageInvalid,
)
from kmsfs.kms_call import KmsCall

# Codes and request ids come from the wire. Whatever does not look like one is not repeated.
_CODE: Final = re.compile(r"[A-Za-z0-9._]{1,80}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._=/+-]{1,80}")

# How IAM begins to say who may not do what.
_REFUSED: Final = re.compile(
    r"User: (arn:[a-z0-9-]{1,20}:(?:iam|sts)::[0-9]{12}:[\w+=,.@/-]{1,600}) is not authorized",
    re.ASCII,
)

_CREDENTIALS_REFUSED_HINT: Final = (
    "renew the credentials; if they are current, check this machine's clock"
)

# KMS API Reference: errors of Decrypt, Encrypt, GenerateDataKey, ReEncrypt, DescribeKey, CreateKey
# and CreateAlias, and "Common Errors". AWS services spell several of the common ones in two or
# three ways.
_BY_CODE: Final[Mapping[str, tuple[type[KmsfsError], str | None]]] = {
    "AccessDeniedException": (KeyAccessDenied, None),
    "AccessDenied": (KeyAccessDenied, None),
    "NotAuthorized": (KeyAccessDenied, None),
    "InvalidGrantTokenException": (KeyAccessDenied, None),
    "NotFoundException": (KeyNotFound, None),
    "InvalidArnException": (KeyNotFound, None),
    "DisabledException": (KeyUnusable, None),
    "KMSInvalidStateException": (KeyUnusable, None),
    "InvalidKeyUsageException": (
        KeyUnusable,
        "name a symmetric key whose usage is ENCRYPT_DECRYPT",
    ),
    "IncorrectKeyException": (IncorrectKey, None),
    "MalformedPolicyDocumentException": (KeyPolicyRefused, None),
    "AlreadyExistsException": (OutputExists, "choose another name with --alias"),
    "InvalidAliasNameException": (UsageInvalid, "choose another name with --alias"),
    "InvalidCiphertextException": (
        CiphertextInvalid,
        "it was altered or cut short, or encrypted under another encryption context",
    ),
    "KeyUnavailableException": (KmsUnreachable, None),
    "DependencyTimeoutException": (KmsUnreachable, None),
    "KMSInternalException": (KmsUnreachable, None),
    "InternalFailure": (KmsUnreachable, None),
    "InternalError": (KmsUnreachable, None),
    "ServiceUnavailable": (KmsUnreachable, None),
    "ServiceUnavailableException": (KmsUnreachable, None),
    "RequestTimeout": (KmsUnreachable, None),
    "RequestTimeoutException": (KmsUnreachable, None),
    "RequestAbortedException": (KmsUnreachable, None),
    "ThrottlingException": (KmsThrottled, None),
    "Throttling": (KmsThrottled, None),
    "ThrottledException": (KmsThrottled, None),
    "TooManyRequestsException": (KmsThrottled, None),
    "RequestLimitExceeded": (KmsThrottled, None),
    "RequestThrottled": (KmsThrottled, None),
    "RequestThrottledException": (KmsThrottled, None),
    "SlowDown": (KmsThrottled, None),
    "LimitExceededException": (KmsThrottled, None),
    "ExpiredToken": (CredentialsUnavailable, "renew the credentials"),
    "ExpiredTokenException": (CredentialsUnavailable, "renew the credentials"),
    "RequestExpired": (CredentialsUnavailable, "check this machine's clock"),
    "RequestInTheFuture": (CredentialsUnavailable, "check this machine's clock"),
    "AuthFailure": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "IncompleteSignature": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "IncompleteSignatureException": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "InvalidAccessKeyId": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "InvalidClientTokenId": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "InvalidSignatureException": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "MissingAuthenticationToken": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "MissingAuthenticationTokenException": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "SignatureDoesNotMatch": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "UnrecognizedClientException": (CredentialsUnavailable, _CREDENTIALS_REFUSED_HINT),
    "OptInRequired": (CredentialsUnavailable, "the account is not enabled for this region"),
}

_CREDENTIAL_ERRORS: Final = (
    boto.CredentialRetrievalError,
    boto.InvalidIMDSEndpointError,
    boto.InvalidIMDSEndpointModeError,
    boto.LoginError,
    boto.MetadataRetrievalError,
    boto.MissingDependencyException,
    boto.NoAuthTokenError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.RefreshWithMFAUnsupportedError,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
    boto.UnknownCredentialError,
    boto.UnknownTokenProviderError,
)

_REGION_ERRORS: Final = (
    boto.EndpointVariantError,
    boto.InvalidRegionError,
    boto.NoRegionError,
    boto.UnknownEndpointError,
    boto.UnknownFIPSEndpointError,
    boto.UnknownRegionError,
)

_CONFIG_ERRORS: Final = (
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.EndpointProviderError,
    boto.InvalidConfigError,
    boto.InvalidDefaultsMode,
    boto.InvalidEndpointConfigurationError,
    boto.InvalidProxiesConfigError,
    boto.InvalidRetryConfigurationError,
    boto.InvalidSTSRegionalEndpointsConfigError,
    boto.ParamValidationError,
)

_NETWORK_ERRORS: Final = (
    boto.CapacityNotAvailableError,
    boto.ConnectionError,
    boto.HTTPClientError,
)

_UNREADABLE: Final = (
    ResponseParserError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
)

STRAY: Final = (*_UNREADABLE, OSError, EOFError, RuntimeError)
"""What botocore lets out beside its own errors: its parsers where an answer is not what the
protocol says; its sources of credentials where a token file is missing, a program answers no
JSON, or there is nobody to ask for an MFA code."""

# Where those sources live.
_CREDENTIAL_MODULES: Final = frozenset({"botocore.credentials", "botocore.tokens"})


class DryRunSucceededError(Exception):
    """KMS would have done what it was asked whether it would: AWS says so by an error."""


_DRY_RUN_SUCCEEDED: Final = "DryRunOperationException"


@contextlib.contextmanager
def translating(operation: str, key_id: str | None) -> Iterator[None]:
    """Turn everything that botocore lets out inside into errors of ours; arguments as below.

    Raises:
        DryRunSucceededError: see there.
    """
    try:
        yield
    except boto.ClientError as error:
        if error.response.get("Error", {}).get("Code") == _DRY_RUN_SUCCEEDED:
            raise DryRunSucceededError from None
        raise translate_client_error(error, operation, key_id) from None
    except boto.BotoCoreError as error:
        raise translate_botocore_error(error, operation, key_id) from None
    except STRAY as error:
        translated = translate_stray(error, operation, key_id)
        if translated is None:
            raise
        raise translated from None


def translate_client_error(
    error: boto.ClientError, operation: str, key_id: str | None
) -> KmsfsError:
    """An error that a service answered, KMS or one that credentials come from.

    Args:
        operation: what was asked of KMS, such as `Decrypt`.
        key_id: the key as it was named to KMS; None where the blob names it.

    Returns: an error that has the request with it, if it is KMS that answered.
    """
    answered = error.response.get("Error", {})
    metadata: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode")
    code = _matching(_CODE, answered.get("Code")) or "no error code"
    told = code if code != str(status) else f"HTTP status {code}"
    request_id = request_id_of(error.response)
    if request_id is not None:
        told = f"{told} (request {request_id})"
    kind, hint = _BY_CODE.get(code, (None, None))
    if kind is None:
        kind = _by_status(status)
    if error.operation_name != operation:
        if issubclass(kind, KmsUnreachable):
            return kind(f"{error.operation_name}: {told}", hint=hint)
        return CredentialsUnavailable(f"{error.operation_name}: {told}")
    translated = kind(f"{describe(operation, key_id)}: {told}", hint=hint)
    translated.call = KmsCall(
        key_id=key_id, request_id=request_id, principal=_principal(answered.get("Message"))
    )
    return translated


def request_id_of(answer: Mapping[str, Any]) -> str | None:
    """The request id in an answer or a refusal."""
    metadata = answer.get("ResponseMetadata")
    found = metadata.get("RequestId") if isinstance(metadata, dict) else None
    return _matching(_REQUEST_ID, found)


def _principal(message: object) -> str | None:
    """Whom a refusal names; nothing else of its text is repeated."""
    found = _REFUSED.match(message) if isinstance(message, str) else None
    return found[1] if found is not None else None


def translate_botocore_error(
    error: boto.BotoCoreError, operation: str, key_id: str | None
) -> KmsfsError:
    """An error that botocore met on this machine or on the way; arguments as above."""
    name = type(error).__name__
    what = describe(operation, key_id)
    match error:
        case boto.ProfileNotFound():
            return CredentialsUnavailable(
                f"AWS profile {error.kwargs.get('profile')!r} does not exist",
                hint="check --profile, AWS_PROFILE and ~/.aws/config",
            )
        case boto.PartialCredentialsError():
            return CredentialsUnavailable(
                f"incomplete AWS credentials from {error.kwargs.get('provider')}, "
                f"missing {error.kwargs.get('cred_var')}"
            )
        case boto.NoCredentialsError():
            return CredentialsUnavailable("no AWS credentials found")
        case boto.CredentialRetrievalError() | boto.TokenRetrievalError():
            return CredentialsUnavailable(
                f"AWS credentials from {error.kwargs.get('provider')}: {name}"
            )
        case boto.ConfigParseError():
            return ConfigInvalid(f"AWS configuration {error.kwargs.get('path')} cannot be parsed")
        case boto.SSLError():
            return KmsUnreachable(
                f"{what}: TLS failed with {_host(error)}",
                hint="check the endpoint, the CA bundle (AWS_CA_BUNDLE) and this machine's clock",
            )
    if isinstance(error, _CREDENTIAL_ERRORS):
        return CredentialsUnavailable(f"no usable AWS credentials: {name}")
    if isinstance(error, _REGION_ERRORS):
        return RegionUnknown(f"{what}: {name}")
    if isinstance(error, _CONFIG_ERRORS):
        return ConfigInvalid(f"{what}: botocore refuses these settings: {name}")
    if isinstance(error, _NETWORK_ERRORS):
        return KmsUnreachable(f"{what}: {name} ({_host(error)})")
    return KmsAnswerInvalid(f"{what}: {name}")


def translate_stray(error: Exception, operation: str, key_id: str | None) -> KmsfsError | None:
    """One of `STRAY`; None where it is neither of credentials nor of an answer."""
    name = type(error).__name__
    if _passed_through(error.__traceback__, _CREDENTIAL_MODULES):
        return CredentialsUnavailable(f"no usable AWS credentials: {name} from their source")
    if isinstance(error, _UNREADABLE):
        return KmsAnswerInvalid(
            f"{describe(operation, key_id)}: the answer cannot be read ({name})"
        )
    return None


def describe(operation: str, key_id: str | None) -> str:
    """An operation and the key it was about, for an error's detail."""
    return f"{operation} under {key_id}" if key_id is not None else f"{operation} under any key"


def _passed_through(trace: TracebackType | None, modules: Container[str]) -> bool:
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") in modules:
            return True
        trace = trace.tb_next
    return False


def _by_status(status: object) -> type[KmsfsError]:
    """The kind of an answer whose code KMS is not known to give."""
    if not isinstance(status, int):
        return KmsAnswerInvalid
    if status == 429:
        return KmsThrottled
    return KmsUnreachable if status >= 500 else KmsAnswerInvalid


def _matching(pattern: re.Pattern[str], text: object) -> str | None:
    return text if isinstance(text, str) and pattern.fullmatch(text) else None


def _host(error: boto.BotoCoreError) -> str:
    """Host and port of the endpoint; a URL may hold a password."""
    url = error.kwargs.get("endpoint_url") or error.kwargs.get("proxy_url")
    if not isinstance(url, str):
        return "endpoint unknown"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "endpoint unknown"
    return f"{host}:{port}" if port is not None else str(host)
