"""AWS KMS through botocore, which only this module and the others named `aws_*` import.

Botocore leaves plaintext on the heap in forms that nothing can wipe: a mount calls this in
workers only, whose end is the eraser. Its loggers show response bodies at DEBUG; nothing here
touches their levels.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from kmsfs.errors import (
    CiphertextInvalid,
    CredentialsUnavailable,
    DeadlineExceeded,
    KmsAnswerInvalid,
    KmsfsError,
    PlaintextTooLarge,
    RegionUnknown,
    UsageInvalid,
)
from kmsfs.keys import aws_errors, deadline
from kmsfs.keys.aws_answers import take_bytes, take_key_arn
from kmsfs.keys.aws_session import AwsSession, credential_source, region_of, warm_up
from kmsfs.keys.credentials import CredentialStore
from kmsfs.keys.service import DataKey, Decryption, Encryption, ReEncryption
from kmsfs.kms_call import KmsCall
from kmsfs.settings import KmsSettings

__all__ = ["AwsKeyService", "credential_source", "warm_up"]

# KMS API Reference: CiphertextBlob of Decrypt, Plaintext of Encrypt, NumberOfBytes.
MAX_CIPHERTEXT_BYTES: Final = 6144
MAX_PLAINTEXT_BYTES: Final = 4096
MAX_DATA_KEY_BYTES: Final = 1024


class AwsKeyService:
    """`KeyService` over AWS KMS.

    Credentials are resolved at the first call and kept, refreshed by botocore where their source
    can do so. Where none were found or KMS refuses them, everything is dropped, and what the
    environment and the files say by then is used: once more in the same call if the refused ones
    had been kept, else in the next.

    Clients are kept by region: that of the key's ARN, else the one of the settings, else
    botocore's own (AWS_DEFAULT_REGION, the profile).

    Every call ends within its time, see `kmsfs.keys.deadline` for the means.

    Args:
        settings: profile, role_arn, region, endpoint_url and deadline_s are used. endpoint_url
            is that of KMS alone; STS has AWS_ENDPOINT_URL_STS.
        deadline_s: time for each call in seconds, in place of `settings.deadline_s`.
        confine: for a process that gives up its rights once it has credentials: called between
            finding them and the first call to KMS, with the TCP ports that such calls go to.
            Credentials are then found once and neither refreshed nor replaced; see `worn`. Where
            none are found, `confine` is not called, and they are looked for in the next call.
        store: where other processes of this kind leave and find credentials.
    """

    def __init__(
        self,
        settings: KmsSettings,
        *,
        deadline_s: float | None = None,
        confine: Callable[[frozenset[int]], None] | None = None,
        store: CredentialStore | None = None,
    ) -> None:
        self._settings = settings
        self._confine = confine
        self._store = store
        self._confined = False
        self._half_confined = False
        self._refused = False
        self._found_now = False
        self._call_s = settings.deadline_s if deadline_s is None else deadline_s
        self._ends_at: float | None = None
        self._session: AwsSession | None = None

    def set_deadline(self, seconds: float | None) -> None:
        """Give all calls from now on, together, this time; None for each its own again."""
        self._found_now = False
        self._ends_at = None if seconds is None else time.monotonic() + seconds

    @property
    def credential_source(self) -> str | None:
        """Where the credentials in use came from; None before the first call.

        `environment`, or botocore's name: `shared-credentials-file`, `config-file`, `sso`,
        `custom-process`, `assume-role`, `assume-role-with-web-identity`, `container-role`,
        `iam-role`, `login`.
        """
        return None if self._session is None else self._session.credential_source

    @property
    def worn(self) -> bool:
        """Whether this process is to end: KMS refused its credentials, they end soon, or it could
        not be confined."""
        frozen = None if self._session is None else self._session.frozen
        ends_soon = frozen is not None and frozen.near_expiry
        return self._refused or self._half_confined or ends_soon

    @property
    def refused_what_was_kept(self) -> bool:
        """Whether KMS refused credentials that were not looked for since `set_deadline`: another
        process may find better ones."""
        return self._refused and not self._found_now

    def prepare(self, key_ids: Sequence[str]) -> None:
        """Find credentials and confine this process now, if it is to be and is not yet.

        Does nothing where no region is known before a ciphertext tells it.

        Args:
            key_ids: those that will be asked for.

        Raises: as `decrypt`, where there are no credentials.
        """
        if self._confine is None or self._confined:
            return
        key_id = next((key_id for key_id in key_ids if region_of(key_id)), None)
        with (
            self._dropping_on_refusal(),
            deadline.limit(self._seconds_left()),
            aws_errors.translating("Decrypt", key_id),
        ):
            session = self._session = self._session or AwsSession(self._settings)
            region = region_of(key_id) or session.region
            if region is not None:
                self._freeze(session, region, key_id)

    def find_credentials(self, key_ids: Sequence[str]) -> None:
        """Find credentials now, and be ready for a first call; KMS is not connected to.

        What is there then may be used by each of several forked processes. Does nothing where no
        region is known before a ciphertext tells it.

        Args:
            key_ids: those that will be asked for.

        Raises: as `decrypt`, where there are no credentials.
        """
        key_id = next((key_id for key_id in key_ids if region_of(key_id)), None)
        with (
            self._dropping_on_refusal(),
            deadline.limit(self._seconds_left()),
            aws_errors.translating("Decrypt", key_id),
        ):
            session = self._session = self._session or AwsSession(self._settings)
            region = region_of(key_id) or session.region
            if region is not None:
                session.client(region)

    def decrypt(
        self, ciphertext: bytes, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> Decryption:
        """As `KeyService.decrypt`.

        Raises:
            KmsAnswerInvalid: also where KMS names another key than the one whose ARN was sent.
        """
        parameters = _decrypt_parameters(ciphertext, key_id, encryption_context)
        answer = self._call("Decrypt", key_id, parameters)
        plaintext = take_bytes(answer, "Plaintext", "Decrypt", MAX_PLAINTEXT_BYTES)
        key_arn = take_key_arn(answer, "Decrypt", key_id)
        request_id = aws_errors.request_id_of(answer)
        return Decryption(
            plaintext, key_arn, self._signed(KmsCall(key_id=key_arn, request_id=request_id))
        )

    def would_decrypt(
        self, ciphertext: bytes | None, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> None:
        """As `DecryptProbe.would_decrypt`, by a dry run.

        Raises:
            KmsAnswerInvalid: also where a plaintext came all the same; it is dropped.
        """
        parameters = _decrypt_parameters(ciphertext, key_id, encryption_context)
        parameters["DryRun"] = True
        if ciphertext is None:
            parameters["DryRunModifiers"] = ["IGNORE_CIPHERTEXT"]
        try:
            answer = self._call("Decrypt", key_id, parameters)
        except aws_errors.DryRunSucceededError:
            return
        answer.clear()
        raise KmsAnswerInvalid(
            f"{aws_errors.describe('Decrypt', key_id)}: asked only whether it would, it decrypted",
            hint="what answers in place of KMS knows no DryRun; try --decrypt",
        )

    def encrypt(
        self, plaintext: bytes, *, key_id: str, encryption_context: Mapping[str, str]
    ) -> Encryption:
        """As `KeyService.encrypt`.

        Raises:
            PlaintextTooLarge: more than 4096 bytes.
            UsageInvalid: no bytes at all.
        """
        if not plaintext:
            raise UsageInvalid("KMS does not encrypt an empty plaintext")
        if len(plaintext) > MAX_PLAINTEXT_BYTES:
            raise PlaintextTooLarge(
                f"{len(plaintext)} bytes, KMS encrypts {MAX_PLAINTEXT_BYTES} at most"
            )
        answer = self._call(
            "Encrypt",
            key_id,
            {
                "KeyId": key_id,
                "Plaintext": plaintext,
                "EncryptionContext": dict(encryption_context),
            },
        )
        ciphertext = take_bytes(answer, "CiphertextBlob", "Encrypt", MAX_CIPHERTEXT_BYTES)
        return Encryption(ciphertext, take_key_arn(answer, "Encrypt", key_id))

    def re_encrypt(
        self,
        ciphertext: bytes,
        *,
        source_key_id: str | None,
        key_id: str,
        encryption_context: Mapping[str, str],
    ) -> ReEncryption:
        """As `KeyService.re_encrypt`.

        The request goes to the region of `key_id`, where both keys must be.
        """
        _check_size(ciphertext)
        operation = "ReEncrypt"
        parameters: dict[str, Any] = {
            "CiphertextBlob": ciphertext,
            "DestinationKeyId": key_id,
            "SourceEncryptionContext": dict(encryption_context),
            "DestinationEncryptionContext": dict(encryption_context),
        }
        if source_key_id is not None:
            parameters["SourceKeyId"] = source_key_id
        answer = self._call(operation, key_id, parameters)
        return ReEncryption(
            take_bytes(answer, "CiphertextBlob", operation, MAX_CIPHERTEXT_BYTES),
            take_key_arn(answer, operation, key_id),
            take_key_arn({"KeyId": answer.get("SourceKeyId")}, operation, source_key_id),
        )

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """As `KeyService.generate_data_key`.

        Raises:
            UsageInvalid: `size_bytes` is not from 1 to 1024.
        """
        if not 1 <= size_bytes <= MAX_DATA_KEY_BYTES:
            raise UsageInvalid(f"KMS gives data keys of 1 to {MAX_DATA_KEY_BYTES} bytes")
        operation = "GenerateDataKey"
        answer = self._call(
            operation,
            key_id,
            {
                "KeyId": key_id,
                "NumberOfBytes": size_bytes,
                "EncryptionContext": dict(encryption_context),
            },
        )
        plaintext = take_bytes(answer, "Plaintext", operation, size_bytes)
        if len(plaintext) != size_bytes:
            raise KmsAnswerInvalid(f"{operation}: a data key of {len(plaintext)} bytes")
        ciphertext = take_bytes(answer, "CiphertextBlob", operation, MAX_CIPHERTEXT_BYTES)
        return DataKey(plaintext, ciphertext, take_key_arn(answer, operation, key_id))

    def resolve_key_arn(self, key_id: str) -> str:
        """As `KeyService.resolve_key_arn`."""
        operation = "DescribeKey"
        metadata = self._call(operation, key_id, {"KeyId": key_id}).get("KeyMetadata")
        arn = metadata.get("Arn") if isinstance(metadata, dict) else None
        return take_key_arn({"KeyId": arn}, operation, key_id)

    # --- calling -------------------------------------------------------------------------------

    def _call(
        self, operation: str, key_id: str | None, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        with self._dropping_on_refusal(), deadline.limit(self._seconds_left()):
            if self._session is not None and not self._confined:
                with contextlib.suppress(CredentialsUnavailable), self._dropping_on_refusal():
                    return self._call_once(operation, key_id, parameters)
            return self._call_once(operation, key_id, parameters)

    def _seconds_left(self) -> float:
        return self._call_s if self._ends_at is None else self._ends_at - time.monotonic()

    @contextlib.contextmanager
    def _dropping_on_refusal(self) -> Iterator[None]:
        try:
            yield
        except (CredentialsUnavailable, DeadlineExceeded) as error:
            session = self._session
            if session is None or not self._confined:
                self._session = None
            elif isinstance(error, DeadlineExceeded):
                session.drop_clients()
            else:
                self._refused = True
                if self._store is not None and session.frozen is not None:
                    self._store.discard(session.frozen)
            raise

    def _call_once(
        self, operation: str, key_id: str | None, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        try:
            with aws_errors.translating(operation, key_id):
                session = self._session = self._session or AwsSession(self._settings)
                region = region_of(key_id) or session.region
                if region is None:
                    what = aws_errors.describe(operation, key_id)
                    raise RegionUnknown(f"{what}: no region is known")
                self._freeze(session, region, key_id)
                answer = getattr(session.client(region), _METHODS[operation])(**parameters)
        except KmsfsError as error:
            error.call = self._signed(error.call or KmsCall(key_id=key_id))
            raise
        if not isinstance(answer, dict):
            raise KmsAnswerInvalid(f"{operation}: the answer is no structure")
        return answer

    def _signed(self, call: KmsCall) -> KmsCall:
        """A request, with what this process knows of who made it."""
        session = self._session
        return msgspec.structs.replace(
            call,
            access_key_id=None if session is None else session.signed_by,
            principal=call.principal or self._settings.role_arn,
        )

    def _freeze(self, session: AwsSession, region: str, key_id: str | None) -> None:
        if self._confine is None or self._confined:
            return
        session.freeze(region, self._store, about=("Decrypt", key_id))
        ports = session.ports(region)
        self._found_now = session.found_here
        # A deadline may strike in between.
        self._half_confined = True
        self._confine(ports)
        self._confined, self._half_confined = True, False


_METHODS: Final = {
    "Decrypt": "decrypt",
    "Encrypt": "encrypt",
    "ReEncrypt": "re_encrypt",
    "GenerateDataKey": "generate_data_key",
    "DescribeKey": "describe_key",
}


def _decrypt_parameters(
    ciphertext: bytes | None, key_id: str | None, encryption_context: Mapping[str, str]
) -> dict[str, Any]:
    parameters: dict[str, Any] = {"EncryptionContext": dict(encryption_context)}
    if ciphertext is not None:
        _check_size(ciphertext)
        parameters["CiphertextBlob"] = ciphertext
    if key_id is not None:
        parameters["KeyId"] = key_id
    return parameters


def _check_size(ciphertext: bytes) -> None:
    if not 1 <= len(ciphertext) <= MAX_CIPHERTEXT_BYTES:
        raise CiphertextInvalid(
            f"{len(ciphertext)} bytes are no KMS ciphertext blob "
            f"(1 to {MAX_CIPHERTEXT_BYTES} bytes)"
        )
