"""Keys, identities, permissions and the journal of the strict stand-in."""

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.strict_identities import Identity, read_signature, verify_signature
from tests.support.strict_keys import BlobInvalidError, KmsKey, fingerprint_of
from tests.support.strict_model import ServiceError, error
from tests.support.strict_policies import Request, evaluate, parse_policy

REGION = "us-east-1"
ACCOUNT = "111122223333"

_UNREADABLE = (
    "The ciphertext refers to a customer master key that does not exist, does not exist in this "
    "region, or you are not allowed to access."
)


@dataclass(frozen=True)
class Call:
    """One request as it was answered; no plaintext.

    Attributes:
        key_id: KeyId as sent.
        key_arn: the key that it stood for, where it was found.
        context: the encryption context as sent.
        error: the code answered; None for success.
        started: time.monotonic() when it was read.
        ended: when its answer was ready.
    """

    operation: str
    key_id: str | None
    key_arn: str | None
    context: Mapping[str, str]
    region: str
    access_key_id: str | None
    error: str | None
    started: float
    ended: float


@dataclass
class Draft:
    """What is known of a request while it is served.

    Attributes:
        facts: values of condition keys beside the encryption context's.
    """

    operation: str = "unknown"
    key_id: str | None = None
    key: KmsKey | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    region: str = REGION
    signer: Identity | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def identity(self) -> Identity:
        """Who signed it; known once it is authenticated."""
        assert self.signer is not None
        return self.signer


@dataclass
class _Injected:
    code: str
    operation: str | None
    key: KmsKey | None
    left: float


class StrictState:
    """What a test sets and reads; every method may be called while requests are served.

    Attributes:
        admin: an identity of `ACCOUNT` that may do everything there until denied.
        latency_s: what every request takes, beside its key's own.
        slow_contexts: (key, value) of an encryption context to seconds.
        verify_signatures: off saves the time in benchmarks.
        role_lifetime_s: of roles taken on; None for what was asked for.
        waiting: requests that are being answered slowly now.
    """

    def __init__(self, *, verify_signatures: bool = True) -> None:
        self.verify_signatures = verify_signatures
        self.latency_s = 0.0
        self.slow_contexts: dict[tuple[str, str], float] = {}
        self.role_lifetime_s: float | None = None
        self.waiting = 0
        self.stopping = threading.Event()
        self._lock = threading.RLock()
        self._called = threading.Condition(self._lock)
        self._keys: dict[str, KmsKey] = {}
        self._aliases: dict[str, KmsKey] = {}
        self._identities: dict[str, Identity] = {}
        self._roles: dict[str, frozenset[str]] = {}
        self._denied: set[tuple[str, str, str]] = set()
        self._without_policies: set[str] = set()
        self._shared: set[tuple[str, str]] = set()
        self._injected: list[_Injected] = []
        self._calls: list[Call] = []
        self.admin = self.create_identity("admin")

    # --- for tests -----------------------------------------------------------------------------

    def create_key(
        self, *, account: str = ACCOUNT, region: str = REGION, alias: str | None = None, **more: Any
    ) -> KmsKey:
        """A new key; `more` are attributes of `KmsKey`. `alias` begins with `alias/`."""
        key = KmsKey(account, region, **more)
        with self._lock:
            self._keys[key.arn] = key
        if alias is not None:
            self.create_alias(alias, key)
        return key

    def create_alias(self, name: str, key: KmsKey) -> None:
        """A name for a key, in the key's account and region.

        Raises:
            ServiceError: there is one of this name.
        """
        arn = f"arn:aws:kms:{key.region}:{key.account}:{name}"
        with self._lock:
            if arn in self._aliases:
                raise error("AlreadyExistsException", f"An alias with the name {arn} exists")
            self._aliases[arn] = key

    def create_identity(self, name: str, *, account: str = ACCOUNT) -> Identity:
        """A new user with an access key; it may do everything in its account until denied."""
        return self._add(Identity.user(name, account))

    def create_role(self, name: str, *trusted: Identity, account: str = ACCOUNT) -> str:
        """A new role that `trusted` may take on; returns its ARN."""
        arn = f"arn:aws:iam::{account}:role/{name}"
        with self._lock:
            self._roles[arn] = frozenset(identity.access_key_id for identity in trusted)
        return arn

    def take_on(self, role_arn: str) -> Identity:
        """A session of a role, as AssumeRole gives it, whoever may have asked."""
        return self._add(Identity.assumed(role_arn, "test"))

    def keys(self) -> list[KmsKey]:
        """Every key, in the order in which they were made."""
        with self._lock:
            return list(self._keys.values())

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

    def withhold_policies(self, who: Identity | str) -> None:
        """An identity (or a role, by its ARN) without IAM policies: only what a key's policy
        grants to it by name it may do."""
        with self._lock:
            self._without_policies.add(_name_of(who))

    def share(self, key: KmsKey, account: str) -> None:
        """Let another account use a key."""
        with self._lock:
            self._shared.add((account, key.arn))

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

    def calls(self, operation: str | None = None, key: KmsKey | None = None) -> list[Call]:
        """Answered requests, in the order of their answers."""
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

    # --- for operations ------------------------------------------------------------------------

    def note(self, draft: Draft, code: str | None) -> None:
        """Write an answered request into the journal."""
        call = Call(
            draft.operation,
            draft.key_id,
            draft.key.arn if draft.key else None,
            dict(draft.context),
            draft.region,
            draft.signer.access_key_id if draft.signer else None,
            code,
            draft.started,
            time.monotonic(),
        )
        with self._called:
            self._calls.append(call)
            self._called.notify_all()

    def authenticate(
        self, draft: Draft, headers: Mapping[str, str], body: bytes, service: str
    ) -> None:
        """Find out who signed a request, and for which region.

        Raises:
            ServiceError: nobody, nobody known, somebody expired, or not correctly.
        """
        signature = read_signature(headers, service)
        draft.region = signature.region
        with self._lock:
            identity = self._identities.get(signature.access_key_id)
        token = headers.get("x-amz-security-token", "")
        if identity is None or not secrets.compare_digest(identity.session_token or "", token):
            raise error(
                "UnrecognizedClientException",
                "The security token included in the request is invalid.",
            )
        draft.signer = identity
        if identity.expired:
            raise error(
                "ExpiredTokenException", "The security token included in the request is expired"
            )
        if self.verify_signatures:
            verify_signature(signature, identity, headers, body)

    def assume_role(self, draft: Draft, role_arn: str, session_name: str) -> Identity:
        """Let a request's signer take on a role.

        Raises:
            ServiceError: it may not.
        """
        with self._lock:
            trusted = self._roles.get(role_arn, frozenset())
        if draft.identity.access_key_id not in trusted:
            raise ServiceError(
                "AccessDenied",
                f"User: {draft.identity.arn} is not authorized to perform: sts:AssumeRole on "
                f"resource: {role_arn}",
                403,
            )
        return self._add(Identity.assumed(role_arn, session_name))

    def find(self, draft: Draft, key_id: str) -> KmsKey:
        """A key by id, ARN, alias or ARN of an alias.

        Raises:
            ServiceError: NotFoundException, InvalidArnException.
        """
        draft.key_id = draft.key_id or key_id
        if key_id.startswith("arn:"):
            fields = key_id.split(":", 5)
            if len(fields) != 6 or fields[2] != "kms":
                raise error("InvalidArnException", f"Invalid arn {key_id}")
            if fields[3] != draft.region:
                raise error("NotFoundException", f"Invalid arn {fields[3]}")
            arn = key_id
        else:
            resource = key_id if key_id.startswith("alias/") else f"key/{key_id}"
            arn = f"arn:aws:kms:{draft.region}:{draft.identity.account}:{resource}"
        with self._lock:
            key = self._keys.get(arn) or self._aliases.get(arn)
        if key is None:
            what = "Alias" if ":alias/" in arn else "Key"
            raise error("NotFoundException", f"{what} '{arn}' does not exist")
        draft.key = key
        return key

    def key_of_blob(self, draft: Draft, blob: bytes, key_id: str | None, operation: str) -> KmsKey:
        """The key of a blob, which must be the one named, if one is; ready for use.

        Raises:
            ServiceError: the blob is none, is of another key, or the key must not be used.
        """
        named = None
        draft.key_id = key_id
        if key_id is not None:
            named = self.find(draft, key_id)
            self.authorize(draft, named, operation)
        try:
            fingerprint_of(blob)
        except BlobInvalidError:
            raise error("InvalidCiphertextException") from None
        found = self.find_of_blob(blob)
        if named is not None:
            if named is not found:
                raise error(
                    "IncorrectKeyException",
                    "The key ID in the request does not identify a CMK that can perform this "
                    "operation.",
                )
        else:
            # Whether such a key exists is nobody's business who may not use it.
            here = found is not None and found.region == draft.region
            if found is None or not here or not self._is_allowed(draft, found, operation):
                raise error("AccessDeniedException", _UNREADABLE)
            named = found
        self.use(draft, named, operation)
        return named

    def use(self, draft: Draft, key: KmsKey, operation: str) -> None:
        """Wait as long as the key takes, then check that it can be used.

        Raises:
            ServiceError: injected for it, or its state or usage forbid the operation.
        """
        draft.key = key
        slow_s = sum(self.slow_contexts.get(pair, 0.0) for pair in draft.context.items())
        self.wait(key.latency_s + slow_s)
        self.raise_injected(draft, key)
        # Developer Guide, "Key states of AWS KMS keys".
        if key.state == "Disabled":
            raise error("DisabledException", f"{key.arn} is disabled.")
        if key.state != "Enabled":
            words = {"PendingDeletion": "pending deletion", "PendingImport": "pending import"}
            state = words.get(key.state, key.state.lower())
            raise error("KMSInvalidStateException", f"{key.arn} is {state}.")
        if key.usage != "ENCRYPT_DECRYPT":
            raise error(
                "InvalidKeyUsageException",
                f"{key.arn} key usage is {key.usage} which is not valid for {operation}.",
            )

    def authorize(
        self,
        draft: Draft,
        key: KmsKey | None,
        operation: str,
        *,
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Check permissions.

        Args:
            context: the encryption context of this operation, if not the request's own.

        Raises:
            ServiceError: AccessDeniedException.
        """
        if not self._is_allowed(draft, key, operation, context=context):
            raise error(
                "AccessDeniedException",
                f"User: {draft.identity.arn} is not authorized to perform: kms:{operation} on "
                f"resource: {key.arn if key else '*'} because no identity-based policy allows the "
                f"kms:{operation} action",
            )

    def set_policy(self, draft: Draft, key: KmsKey, text: str, *, bypass_check: bool) -> None:
        """Give a key a policy.

        Raises:
            ServiceError: it is not one, or whoever gives it could not do so again.
        """
        statements = parse_policy(text, self._exists)
        verdict = evaluate(statements, Request(draft.identity, "PutKeyPolicy"))
        by_account = verdict.delegated and self._has_policies(draft.identity)
        if not bypass_check and (verdict.denied or not (verdict.granted or by_account)):
            raise error(
                "MalformedPolicyDocumentException",
                "The new key policy will not allow you to update the key policy in the future.",
            )
        key.policy = text

    def forget_key(self, key: KmsKey) -> None:
        """Take back a key that nobody has seen yet."""
        with self._lock:
            del self._keys[key.arn]

    def find_of_blob(self, blob: bytes) -> KmsKey | None:
        """The key of a blob, whoever asks; None if it is none, or of no key here.

        Unlike `key_of_blob` it says nothing of permission.
        """
        try:
            fingerprint = fingerprint_of(blob)
        except BlobInvalidError:
            return None
        with self._lock:
            return next((k for k in self._keys.values() if k.fingerprint == fingerprint), None)

    def raise_injected(self, draft: Draft, key: KmsKey | None) -> None:
        """Raise what `fail` asked for, with a key (in `use`) or without (before)."""
        with self._lock:
            for injected in self._injected:
                if injected.left < 1 or injected.key is not key:
                    continue
                if injected.operation not in (None, draft.operation):
                    continue
                injected.left -= 1
                raise error(injected.code, f"{injected.code}, as a test asked for")

    def wait(self, seconds: float) -> None:
        """Take so long, less when the server stops."""
        if seconds > 0:
            with self._lock:
                self.waiting += 1
            self.stopping.wait(seconds)
            with self._lock:
                self.waiting -= 1

    def _add(self, identity: Identity) -> Identity:
        with self._lock:
            self._identities[identity.access_key_id] = identity
        return identity

    def _exists(self, arn: str) -> bool:
        """Whether there is a role or user of this ARN."""
        with self._lock:
            return arn in self._roles or any(
                arn == identity.arn for identity in self._identities.values()
            )

    def _has_policies(self, identity: Identity) -> bool:
        """Whether its IAM policies allow it everything; else they allow it nothing."""
        with self._lock:
            return not {identity.access_key_id, identity.role_arn} & self._without_policies

    def _is_allowed(
        self,
        draft: Draft,
        key: KmsKey | None,
        operation: str,
        *,
        context: Mapping[str, str] | None = None,
    ) -> bool:
        identity = draft.identity
        resource = key.arn if key else "*"
        who = {identity.access_key_id, identity.role_arn}
        with self._lock:
            denied = any(
                name in who and action in ("*", operation) and arn in ("*", resource)
                for name, action, arn in self._denied
            )
            own = key is None or key.account == identity.account
            shared = own or (identity.account, resource) in self._shared
        by_identity = self._has_policies(identity)
        if denied or key is None or key.policy is None:
            return not denied and shared and by_identity
        request = Request(
            identity, operation, draft.context if context is None else context, draft.facts
        )
        verdict = evaluate(parse_policy(key.policy, lambda _: True), request)
        if verdict.denied:
            return False
        # Whom a key's policy names needs nothing else in its own account; elsewhere it needs
        # IAM policies too.
        return (verdict.granted and own) or ((verdict.granted or verdict.delegated) and by_identity)


def _name_of(who: Identity | str) -> str:
    return who if isinstance(who, str) else who.access_key_id
