"""A strict stand-in for AWS KMS, written from its API reference and service model.

Signatures, types and bounds are verified; keys have states and owners; every refusal has the
code and the status of KMS. It also answers STS AssumeRole. One server plays all regions, which
requests name in their signatures, and as many accounts as there are identities and keys.

In a test::

    with StrictKms() as kms:
        key = kms.create_key()
        env = kms.env()                      # for child processes
        kms.deny(kms.admin, "Decrypt", key)  # from now on
        assert kms.calls("Decrypt")[-1].error == "AccessDeniedException"

As a process, `python -m tests.support.strict_kms --help`; it ends with its standard input.
"""

import argparse
import base64
import contextlib
import http.server
import json
import os
import secrets
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from xml.sax.saxutils import escape

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.session
from botocore.config import Config

from tests.support.strict_keys import BlobInvalidError, KmsKey, fingerprint_of
from tests.support.strict_model import ServiceError, encode_output, error, kms_model, parse_input

REGION = "us-east-1"
ACCOUNT = "111122223333"

_UNREADABLE = (
    "The ciphertext refers to a customer master key that does not exist, does not exist in this "
    "region, or you are not allowed to access."
)


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

    @property
    def arn(self) -> str:
        """As it stands in refusals."""
        if self.role_arn is not None:
            role = self.role_arn.rpartition("/")[2]
            return f"arn:aws:sts::{self.account}:assumed-role/{role}/{self.name}"
        return f"arn:aws:iam::{self.account}:user/{self.name}"


@dataclass(frozen=True)
class Call:
    """One request as it was answered; no plaintext.

    Attributes:
        key_id: KeyId as sent.
        key_arn: the key that it stood for, where it was found.
        context: the encryption context as sent.
        error: the code answered; None for success.
        started: time.monotonic() when it was read.
    """

    operation: str
    key_id: str | None
    key_arn: str | None
    context: Mapping[str, str]
    region: str
    access_key_id: str | None
    error: str | None
    started: float


@dataclass
class _Draft:
    """What is known of a request while it is served."""

    operation: str = "unknown"
    key_id: str | None = None
    key: KmsKey | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    region: str = REGION
    identity: Identity | None = None


@dataclass
class _Injected:
    code: str
    operation: str | None
    key: KmsKey | None
    left: float


class StrictKms:
    """The stand-in and its state; every method may be called while it serves.

    Attributes:
        admin: an identity of `ACCOUNT` that may do everything there until denied.
        latency_s: what every request takes, beside its key's own.
        slow_contexts: (key, value) of an encryption context to seconds.
        verify_signatures: off saves the time in benchmarks.
    """

    def __init__(self, *, verify_signatures: bool = True) -> None:
        self.verify_signatures = verify_signatures
        self.latency_s = 0.0
        self.slow_contexts: dict[tuple[str, str], float] = {}
        self._lock = threading.RLock()
        self._keys: dict[str, KmsKey] = {}
        self._aliases: dict[str, KmsKey] = {}
        self._identities: dict[str, Identity] = {}
        self._roles: dict[str, set[str]] = {}
        self._denied: set[tuple[str, str, str]] = set()
        self._granted: set[tuple[str, str]] = set()
        self._injected: list[_Injected] = []
        self._calls: list[Call] = []
        self._called = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.daemon = True
        self.admin = self.create_identity("admin")

    # --- as a server ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """On 127.0.0.1."""
        return int(self._server.server_address[1])

    @property
    def endpoint_url(self) -> str:
        """Of KMS and STS."""
        return f"http://127.0.0.1:{self.port}"

    def env(self, identity: Identity | None = None, **more: str) -> dict[str, str]:
        """Environment for a child process that calls as `identity` (the admin by default)."""
        identity = identity or self.admin
        found = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "LC_ALL": "C.UTF-8",
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": identity.access_key_id,
            "AWS_SECRET_ACCESS_KEY": identity.secret_access_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if identity.session_token is not None:
            found["AWS_SESSION_TOKEN"] = identity.session_token
        return {**found, **more}

    def client(self, identity: Identity | None = None, region: str = REGION) -> Any:
        """A client of botocore, with one attempt a call."""
        identity = identity or self.admin
        return botocore.session.Session().create_client(
            "kms",
            region_name=region,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=identity.access_key_id,
            aws_secret_access_key=identity.secret_access_key,
            aws_session_token=identity.session_token,
            config=Config(retries={"total_max_attempts": 1}, read_timeout=5),
        )

    # --- keys, identities, permissions ---------------------------------------------------------

    def create_key(
        self, *, account: str = ACCOUNT, region: str = REGION, alias: str | None = None, **more: Any
    ) -> KmsKey:
        """A new key; `more` are attributes of `KmsKey`. `alias` begins with `alias/`."""
        key = KmsKey(account, region, **more)
        with self._lock:
            self._keys[key.arn] = key
            if alias is not None:
                self._aliases[f"arn:aws:kms:{region}:{account}:{alias}"] = key
        return key

    def create_identity(self, name: str, *, account: str = ACCOUNT) -> Identity:
        """A new user with an access key; it may do everything in its account until denied."""
        identity = Identity(account, name, _access_key_id("AKIA"), secrets.token_urlsafe(30))
        with self._lock:
            self._identities[identity.access_key_id] = identity
        return identity

    def create_role(self, name: str, *trusted: Identity, account: str = ACCOUNT) -> str:
        """A new role that `trusted` may take on; returns its ARN."""
        arn = f"arn:aws:iam::{account}:role/{name}"
        with self._lock:
            self._roles[arn] = {identity.access_key_id for identity in trusted}
        return arn

    def remove_identity(self, identity: Identity) -> None:
        """Its access key is unknown from now on."""
        with self._lock:
            del self._identities[identity.access_key_id]

    def deny(self, who: Identity | str, operation: str = "*", key: KmsKey | None = None) -> None:
        """Refuse an identity (or a role, by its ARN) an operation with a key; all by default."""
        with self._lock:
            self._denied.add((_name_of(who), operation, key.arn if key else "*"))

    def allow(self, who: Identity | str, operation: str = "*", key: KmsKey | None = None) -> None:
        """Take a `deny` of the same arguments back."""
        with self._lock:
            self._denied.discard((_name_of(who), operation, key.arn if key else "*"))

    def share(self, key: KmsKey, account: str) -> None:
        """Let another account use a key."""
        with self._lock:
            self._granted.add((account, key.arn))

    def fail(
        self,
        code: str,
        *,
        times: float = float("inf"),
        operation: str | None = None,
        key: KmsKey | None = None,
    ) -> None:
        """Answer the next `times` requests with an error: throttling and KMS's own failures."""
        with self._lock:
            self._injected.append(_Injected(code, operation, key, times))

    def heal(self) -> None:
        """Forget every `fail` and all latencies."""
        with self._lock:
            self._injected.clear()
            self.slow_contexts.clear()
            self.latency_s = 0.0
            for key in self._keys.values():
                key.latency_s = 0.0

    # --- the journal ---------------------------------------------------------------------------

    def calls(self, operation: str | None = None, key: KmsKey | None = None) -> list[Call]:
        """Answered requests, in order of their answers."""
        with self._lock:
            return [
                call
                for call in self._calls
                if operation in (None, call.operation) and (key is None or call.key_arn == key.arn)
            ]

    def forget_calls(self) -> None:
        """Begin the journal anew."""
        with self._lock:
            self._calls.clear()

    def wait_for_calls(
        self, count: int, operation: str | None = None, timeout_s: float = 5.0
    ) -> list[Call]:
        """Wait until so many requests were answered.

        Raises:
            AssertionError: they were not in time.
        """
        with self._called:
            came = self._called.wait_for(lambda: len(self.calls(operation)) >= count, timeout_s)
            found = self.calls(operation)
        assert came, f"{len(found)} calls of {operation}, not {count}, within {timeout_s} s"
        return found

    # --- serving -------------------------------------------------------------------------------

    def serve(self, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Answer one request: status, body, headers."""
        started = time.monotonic()
        draft = _Draft()
        code = None
        try:
            answer, content_type = self._serve(draft, headers, body)
            status = 200
        except ServiceError as refusal:
            status, code = refusal.status, refusal.code
            answer, content_type = _error_body(refusal, draft.operation)
        with self._called:
            self._calls.append(
                Call(
                    draft.operation,
                    draft.key_id,
                    draft.key.arn if draft.key else None,
                    dict(draft.context),
                    draft.region,
                    draft.identity.access_key_id if draft.identity else None,
                    code,
                    started,
                )
            )
            self._called.notify_all()
        return status, answer, {"Content-Type": content_type}

    def _serve(self, draft: _Draft, headers: Mapping[str, str], body: bytes) -> tuple[bytes, str]:
        if "x-amz-target" not in headers:
            return self._assume_role(draft, headers, body), "text/xml"
        prefix, _, operation = headers["x-amz-target"].partition(".")
        if prefix != kms_model().metadata["targetPrefix"]:
            raise ServiceError("UnknownOperationException", None, 404)
        draft.operation = operation
        draft.identity, draft.region = self._authenticate(headers, body, "kms")
        try:
            raw = json.loads(body or b"{}")
        except ValueError:
            raise ServiceError("SerializationException") from None
        parameters = parse_input(operation, raw)
        handler = _OPERATIONS.get(operation)
        if handler is None:
            raise ServiceError("UnknownOperationException", None, 404)
        context = parameters.get("EncryptionContext", parameters.get("SourceEncryptionContext"))
        draft.context = context or {}
        self._wait(self.latency_s)
        self._raise_injected(draft, None)
        answer = handler(self, draft, parameters)
        return json.dumps(encode_output(answer)).encode(), "application/x-amz-json-1.1"

    def _decrypt(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        blob = given.get("CiphertextBlob")
        if blob is None and "IGNORE_CIPHERTEXT" not in given.get("DryRunModifiers", ()):
            raise error("ValidationException", "Value at 'ciphertextBlob' must not be null")
        key = self._key_of_blob(draft, blob, given.get("KeyId"), "Decrypt")
        plaintext = b""
        if blob is not None:
            plaintext = _open(key, blob, given.get("EncryptionContext", {}))
        _end_dry_run(given)
        return {"KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": _SYMMETRIC}

    def _encrypt(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        key = self._usable_key(draft, given["KeyId"], "Encrypt", given)
        blob = key.seal(given["Plaintext"], given.get("EncryptionContext", {}))
        return {"KeyId": key.arn, "CiphertextBlob": blob, "EncryptionAlgorithm": _SYMMETRIC}

    def _generate_data_key(
        self, draft: _Draft, given: dict[str, Any], operation: str = "GenerateDataKey"
    ) -> dict[str, Any]:
        if ("NumberOfBytes" in given) == ("KeySpec" in given):
            raise error("ValidationException", "Please specify either number of bytes or key spec.")
        key = self._usable_key(draft, given["KeyId"], operation, given)
        sizes = {"AES_256": 32, "AES_128": 16}
        plaintext = os.urandom(given.get("NumberOfBytes") or sizes[given["KeySpec"]])
        blob = key.seal(plaintext, given.get("EncryptionContext", {}))
        return {"KeyId": key.arn, "Plaintext": plaintext, "CiphertextBlob": blob}

    def _generate_data_key_without_plaintext(
        self, draft: _Draft, given: dict[str, Any]
    ) -> dict[str, Any]:
        if not {"NumberOfBytes", "KeySpec"} & given.keys():
            given["KeySpec"] = "AES_256"
        answer = self._generate_data_key(draft, given, "GenerateDataKeyWithoutPlaintext")
        del answer["Plaintext"]
        return answer

    def _re_encrypt(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        blob = given.get("CiphertextBlob")
        if blob is None:
            raise error("ValidationException", "Value at 'ciphertextBlob' must not be null")
        source = self._key_of_blob(draft, blob, given.get("SourceKeyId"), "ReEncryptFrom")
        target = self._usable_key(draft, given["DestinationKeyId"], "ReEncryptTo", {})
        plaintext = _open(source, blob, given.get("SourceEncryptionContext", {}))
        _end_dry_run(given)
        return {
            "CiphertextBlob": target.seal(plaintext, given.get("DestinationEncryptionContext", {})),
            "SourceKeyId": source.arn,
            "KeyId": target.arn,
            "SourceEncryptionAlgorithm": _SYMMETRIC,
            "DestinationEncryptionAlgorithm": _SYMMETRIC,
        }

    def _describe_key(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        key = self._find(draft, given["KeyId"])
        self._authorize(draft, key, "DescribeKey")
        return {"KeyMetadata": _metadata(key)}

    def _create_key(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        identity = _signer(draft)
        self._authorize(draft, None, "CreateKey")
        key = self.create_key(
            account=identity.account,
            region=draft.region,
            usage=given.get("KeyUsage", "ENCRYPT_DECRYPT"),
        )
        return {"KeyMetadata": _metadata(key)}

    def _create_alias(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        key = self._find(draft, given["TargetKeyId"])
        self._authorize(draft, key, "CreateAlias")
        name = given["AliasName"]
        if not name.startswith("alias/") or name.startswith("alias/aws/"):
            raise error("ValidationException", "Alias must start with the prefix 'alias/'.")
        arn = f"arn:aws:kms:{key.region}:{key.account}:{name}"
        with self._lock:
            if arn in self._aliases:
                raise error("AlreadyExistsException", f"An alias with the name {arn} exists")
            self._aliases[arn] = key
        return {}

    def _disable_key(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        self._set_state(draft, given, "DisableKey", "Disabled")
        return {}

    def _enable_key(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        self._set_state(draft, given, "EnableKey", "Enabled")
        return {}

    def _schedule_key_deletion(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        days = given.get("PendingWindowInDays", 30)
        if not 7 <= days <= 30:
            raise error("ValidationException", "PendingWindowInDays must be from 7 to 30")
        key = self._set_state(draft, given, "ScheduleKeyDeletion", "PendingDeletion")
        when = time.time() + days * 86400
        return {"KeyId": key.arn, "DeletionDate": when, "KeyState": key.state}

    def _cancel_key_deletion(self, draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
        key = self._find(draft, given["KeyId"])
        self._authorize(draft, key, "CancelKeyDeletion")
        if key.state != "PendingDeletion":
            raise error("KMSInvalidStateException", f"{key.arn} is not pending deletion.")
        key.state = "Disabled"
        return {"KeyId": key.arn}

    def _set_state(
        self, draft: _Draft, given: dict[str, Any], operation: str, state: str
    ) -> KmsKey:
        key = self._find(draft, given["KeyId"])
        self._authorize(draft, key, operation)
        if key.state == "PendingDeletion":
            raise error("KMSInvalidStateException", f"{key.arn} is pending deletion.")
        key.state = state
        return key

    # --- keys of requests ----------------------------------------------------------------------

    def _key_of_blob(
        self, draft: _Draft, blob: bytes | None, key_id: str | None, operation: str
    ) -> KmsKey:
        """The key of a blob, which must be the one named, if one is."""
        named = None
        draft.key_id = key_id
        if key_id is not None:
            named = self._find(draft, key_id)
            self._authorize(draft, named, operation)
        if blob is None:
            if named is None:
                raise error("ValidationException", "Value at 'keyId' must not be null")
            self._use(draft, named, operation)
            return named
        try:
            fingerprint = fingerprint_of(blob)
        except BlobInvalidError:
            raise error("InvalidCiphertextException") from None
        with self._lock:
            known = [key for key in self._keys.values() if key.fingerprint == fingerprint]
        if named is not None:
            if named not in known:
                raise error(
                    "IncorrectKeyException",
                    "The key ID in the request does not identify a CMK that can perform this "
                    "operation.",
                )
            self._use(draft, named, operation)
            return named
        if not known or known[0].region != draft.region:
            raise error("AccessDeniedException", _UNREADABLE)
        try:
            self._authorize(draft, known[0], operation)
        except ServiceError:
            raise error("AccessDeniedException", _UNREADABLE) from None
        self._use(draft, known[0], operation)
        return known[0]

    def _usable_key(
        self, draft: _Draft, key_id: str, operation: str, given: dict[str, Any]
    ) -> KmsKey:
        key = self._find(draft, key_id)
        self._authorize(draft, key, operation)
        self._use(draft, key, operation)
        _end_dry_run(given)
        return key

    def _find(self, draft: _Draft, key_id: str) -> KmsKey:
        """A key by id, ARN, alias or ARN of an alias.

        Raises:
            ServiceError: NotFoundException.
        """
        draft.key_id = draft.key_id or key_id
        account = _signer(draft).account
        if key_id.startswith("arn:"):
            fields = key_id.split(":", 5)
            if len(fields) != 6 or fields[2] != "kms":
                raise error("InvalidArnException", f"Invalid arn {key_id}")
            if fields[3] != draft.region:
                raise error("NotFoundException", f"Invalid arn {fields[3]}")
            arn = key_id
        else:
            resource = key_id if key_id.startswith("alias/") else f"key/{key_id}"
            arn = f"arn:aws:kms:{draft.region}:{account}:{resource}"
        with self._lock:
            key = self._keys.get(arn) or self._aliases.get(arn)
        if key is None:
            what = "Alias" if ":alias/" in arn else "Key"
            raise error("NotFoundException", f"{what} '{arn}' does not exist")
        draft.key = key
        return key

    def _use(self, draft: _Draft, key: KmsKey, operation: str) -> None:
        """Wait as long as the key takes, then check that it can be used.

        Raises:
            ServiceError: injected for it, or its state or usage forbid the operation.
        """
        draft.key = key
        slow_s = sum(self.slow_contexts.get(pair, 0.0) for pair in draft.context.items())
        self._wait(key.latency_s + slow_s)
        self._raise_injected(draft, key)
        # Developer Guide, "Key states of AWS KMS keys".
        match key.state:
            case "Disabled":
                raise error("DisabledException", f"{key.arn} is disabled.")
            case "PendingDeletion":
                raise error("KMSInvalidStateException", f"{key.arn} is pending deletion.")
            case "PendingImport":
                raise error("KMSInvalidStateException", f"{key.arn} is pending import.")
            case "Enabled":
                pass
            case state:
                raise error("KMSInvalidStateException", f"{key.arn} is {state}.")
        if key.usage != "ENCRYPT_DECRYPT":
            raise error(
                "InvalidKeyUsageException",
                f"{key.arn} key usage is {key.usage} which is not valid for {operation}.",
            )

    def _authorize(self, draft: _Draft, key: KmsKey | None, operation: str) -> None:
        identity = _signer(draft)
        resource = key.arn if key else "*"
        who = {identity.access_key_id, identity.role_arn}
        with self._lock:
            denied = any(
                name in who and action in ("*", operation) and arn in ("*", resource)
                for name, action, arn in self._denied
            )
            own = key is None or key.account == identity.account
            own = own or (identity.account, resource) in self._granted
        if denied or not own:
            raise error(
                "AccessDeniedException",
                f"User: {identity.arn} is not authorized to perform: kms:{operation} on resource: "
                f"{resource} because no identity-based policy allows the kms:{operation} action",
            )

    def _raise_injected(self, draft: _Draft, key: KmsKey | None) -> None:
        with self._lock:
            for injected in self._injected:
                if injected.left < 1 or injected.key is not key:
                    continue
                if injected.operation not in (None, draft.operation):
                    continue
                injected.left -= 1
                raise error(injected.code, f"{injected.code}, as a test asked for")

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._stopping.wait(seconds)

    # --- identities of requests ----------------------------------------------------------------

    def _authenticate(
        self, headers: Mapping[str, str], body: bytes, service: str
    ) -> tuple[Identity, str]:
        """Who signed a request, and for which region.

        Raises:
            ServiceError: nobody, nobody known, somebody expired, or not correctly.
        """
        authorization = headers.get("authorization")
        if authorization is None:
            raise error("MissingAuthenticationTokenException", "Missing Authentication Token")
        scheme, _, rest = authorization.partition(" ")
        fields = dict(item.strip().split("=", 1) for item in rest.split(",") if "=" in item)
        scope = fields.get("Credential", "").split("/")
        if scheme != "AWS4-HMAC-SHA256" or len(scope) != 5 or scope[3] != service:
            raise error("IncompleteSignature", "Authorization header is not complete")
        with self._lock:
            identity = self._identities.get(scope[0])
        invalid = "The security token included in the request is invalid."
        if identity is None or identity.session_token != headers.get("x-amz-security-token"):
            raise error("UnrecognizedClientException", invalid)
        if identity.expired:
            raise error(
                "ExpiredTokenException", "The security token included in the request is expired"
            )
        if self.verify_signatures:
            _verify_signature(headers, body, fields, scope, identity)
        return identity, scope[2]

    def _assume_role(self, draft: _Draft, headers: Mapping[str, str], body: bytes) -> bytes:
        given = dict(urllib.parse.parse_qsl(body.decode()))
        draft.operation = given.get("Action", "unknown")
        draft.identity, draft.region = self._authenticate(headers, body, "sts")
        if draft.operation != "AssumeRole":
            raise ServiceError("InvalidAction", "Could not find operation")
        self._raise_injected(draft, None)
        arn = given["RoleArn"]
        with self._lock:
            trusted = self._roles.get(arn, set())
        if draft.identity.access_key_id not in trusted:
            raise ServiceError(
                "AccessDenied",
                f"User: {draft.identity.arn} is not authorized to perform: sts:AssumeRole on "
                f"resource: {arn}",
                403,
            )
        taken_on = Identity(
            arn.split(":")[4],
            given["RoleSessionName"],
            _access_key_id("ASIA"),
            secrets.token_urlsafe(30),
            session_token=secrets.token_urlsafe(60),
            role_arn=arn,
        )
        with self._lock:
            self._identities[taken_on.access_key_id] = taken_on
        until = datetime.now(UTC) + timedelta(seconds=int(given.get("DurationSeconds", "3600")))
        return _ASSUMED.format(
            arn=escape(taken_on.arn),
            access_key_id=taken_on.access_key_id,
            secret_access_key=taken_on.secret_access_key,
            session_token=taken_on.session_token,
            until=until.strftime("%Y-%m-%dT%H:%M:%SZ"),
            request_id=uuid.uuid4(),
        ).encode()


_Operation = Callable[[StrictKms, _Draft, dict[str, Any]], dict[str, Any]]

_OPERATIONS: dict[str, _Operation] = {
    "Decrypt": StrictKms._decrypt,
    "Encrypt": StrictKms._encrypt,
    "GenerateDataKey": StrictKms._generate_data_key,
    "GenerateDataKeyWithoutPlaintext": StrictKms._generate_data_key_without_plaintext,
    "ReEncrypt": StrictKms._re_encrypt,
    "DescribeKey": StrictKms._describe_key,
    "CreateKey": StrictKms._create_key,
    "CreateAlias": StrictKms._create_alias,
    "DisableKey": StrictKms._disable_key,
    "EnableKey": StrictKms._enable_key,
    "ScheduleKeyDeletion": StrictKms._schedule_key_deletion,
    "CancelKeyDeletion": StrictKms._cancel_key_deletion,
}

_SYMMETRIC = "SYMMETRIC_DEFAULT"

_ASSUMED = """\
<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>
<AssumedRoleUser><AssumedRoleId>AROA:session</AssumedRoleId><Arn>{arn}</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>{access_key_id}</AccessKeyId>
<SecretAccessKey>{secret_access_key}</SecretAccessKey><SessionToken>{session_token}</SessionToken>
<Expiration>{until}</Expiration></Credentials></AssumeRoleResult>
<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></AssumeRoleResponse>
"""


def _error_body(refusal: ServiceError, operation: str) -> tuple[bytes, str]:
    if operation == "AssumeRole":
        text = (
            "<ErrorResponse><Error><Type>Sender</Type>"
            f"<Code>{refusal.code}</Code><Message>{escape(refusal.message or '')}</Message>"
            f"</Error><RequestId>{uuid.uuid4()}</RequestId></ErrorResponse>"
        )
        return text.encode(), "text/xml"
    answer = {"__type": refusal.code}
    if refusal.message is not None:
        # KMS writes the name small in its own errors and large in those of the front end.
        own = refusal.code in kms_model().shape_names
        answer["message" if own else "Message"] = refusal.message
    return json.dumps(answer).encode(), "application/x-amz-json-1.1"


def _verify_signature(
    headers: Mapping[str, str],
    body: bytes,
    fields: Mapping[str, str],
    scope: list[str],
    identity: Identity,
) -> None:
    """Sign what was received once more and compare.

    Raises:
        ServiceError: InvalidSignatureException.
    """
    when = headers.get("x-amz-date", "")
    signed_at = datetime.strptime(when, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if abs(datetime.now(UTC) - signed_at) > timedelta(minutes=5):
        raise error("InvalidSignatureException", f"Signature not yet current or expired: {when}")
    names = fields["SignedHeaders"].split(";")
    request = botocore.awsrequest.AWSRequest(
        "POST", f"http://{headers['host']}/", {name: headers[name] for name in names}, body
    )
    request.context["timestamp"] = when
    credentials = botocore.credentials.Credentials(
        identity.access_key_id, identity.secret_access_key, identity.session_token
    )
    signer = botocore.auth.SigV4Auth(credentials, scope[3], scope[2])
    text = signer.string_to_sign(request, signer.canonical_request(request))
    if not secrets.compare_digest(signer.signature(text, request), fields["Signature"]):
        raise error(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided.",
        )


def _open(key: KmsKey, blob: bytes, context: Mapping[str, str]) -> bytes:
    try:
        return key.open(blob, context)
    except BlobInvalidError:
        raise error("InvalidCiphertextException") from None


def _end_dry_run(given: Mapping[str, Any]) -> None:
    if given.get("DryRun"):
        raise error(
            "DryRunOperationException",
            "The request would have succeeded, but the DryRun option is set.",
        )


def _signer(draft: _Draft) -> Identity:
    assert draft.identity is not None
    return draft.identity


def _name_of(who: Identity | str) -> str:
    return who if isinstance(who, str) else who.access_key_id


def _access_key_id(prefix: str) -> str:
    return prefix + base64.b32encode(os.urandom(10)).decode()


def _metadata(key: KmsKey) -> dict[str, Any]:
    return {
        "AWSAccountId": key.account,
        "KeyId": key.key_id,
        "Arn": key.arn,
        "Enabled": key.state == "Enabled",
        "KeyState": key.state,
        "KeyUsage": key.usage,
        "KeyManager": "CUSTOMER",
        "KeySpec": _SYMMETRIC,
        "EncryptionAlgorithms": [_SYMMETRIC],
        "MultiRegion": False,
        "Origin": "AWS_KMS",
    }


class _Server(http.server.ThreadingHTTPServer):
    """Knows its connections, so that they can be ended."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, kms: StrictKms) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kms = kms
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Have every connection's thread see the end of its client."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news here; anything else is a bug to be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without these two every answer waits for a delayed acknowledgement, 45 ms.
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, answer, more = self.server.kms.serve(headers, body)
        self.send_response(status)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Cache-Control", "no-cache, no-store, must-revalidate, private")
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """The journal says more."""


def main(arguments: list[str]) -> None:
    """Serve until standard input ends; the first line printed says where and with which keys."""
    parser = argparse.ArgumentParser(prog="strict_kms", description=__doc__)
    parser.add_argument("--keys", type=int, default=1, help="how many keys to make")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of every request")
    parser.add_argument(
        "--slow-key", action="append", default=[], metavar="N:MS", help="of key N (from 0), more"
    )
    parser.add_argument(
        "--slow-context", action="append", default=[], metavar="KEY=VALUE:MS",
        help="of requests with this pair in their encryption context, more",
    )  # fmt: skip
    parser.add_argument("--no-signatures", action="store_true", help="do not verify signatures")
    given = parser.parse_args(arguments)
    with StrictKms(verify_signatures=not given.no_signatures) as kms:
        kms.latency_s = given.latency_ms / 1000
        keys = [kms.create_key() for _ in range(given.keys)]
        for text in given.slow_key:
            number, _, latency_ms = text.partition(":")
            keys[int(number)].latency_s = float(latency_ms) / 1000
        for text in given.slow_context:
            pair, _, latency_ms = text.rpartition(":")
            name, _, value = pair.partition("=")
            kms.slow_contexts[name, value] = float(latency_ms) / 1000
        known = {"key_arns": [key.arn for key in keys], "env": kms.env()}
        print(json.dumps({"endpoint_url": kms.endpoint_url, **known}), flush=True)
        for _ in _lines():
            pass


def _lines() -> Iterator[bytes]:
    yield from sys.stdin.buffer


if __name__ == "__main__":
    main(sys.argv[1:])
