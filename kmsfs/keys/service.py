"""What kmsfs asks of a key service.

Implementations translate every foreign exception into the classes of `kmsfs.errors` listed at
each method; nothing else leaves them. Calls block and are made in workers and commands only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kmsfs.kms_call import KmsCall


@dataclass(frozen=True, slots=True)
class Decryption:
    """Answer to `KeyService.decrypt`.

    `plaintext` is bytes because that is what boto3 yields; it has no repr and is to be copied
    into locked memory and dropped at once. `call` is what may be known of the request.
    """

    plaintext: bytes = field(repr=False)
    key_arn: str
    call: KmsCall | None = None


@dataclass(frozen=True, slots=True)
class DataKey:
    """Answer to `KeyService.generate_data_key`: a new data key, plain and wrapped."""

    plaintext: bytes = field(repr=False)
    ciphertext: bytes
    key_arn: str


@dataclass(frozen=True, slots=True)
class Encryption:
    """Answer to `KeyService.encrypt`."""

    ciphertext: bytes
    key_arn: str


@dataclass(frozen=True, slots=True)
class ReEncryption:
    """Answer to `KeyService.re_encrypt`: a new blob, its key, and the key it was under before."""

    ciphertext: bytes
    key_arn: str
    source_key_arn: str


class Decrypter(Protocol):
    """Decrypts under keys it never shows.

    Raises (here and below, every method): KeyAccessDenied, KeyNotFound, KeyUnusable,
    CredentialsUnavailable, RegionUnknown, KmsUnreachable, KmsThrottled, KmsAnswerInvalid.
    """

    def decrypt(
        self, ciphertext: bytes, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> Decryption:
        """Decrypt a KMS ciphertext blob of 1 to 6144 bytes.

        Args:
            key_id: ARN, alias or id; None lets KMS take the key from the blob.

        Raises:
            IncorrectKey: another key than `key_id` encrypted the blob.
            CiphertextInvalid: not authentic, or another encryption context.
        """
        ...


class DecryptProbe(Decrypter, Protocol):
    """Also tells whether it would decrypt."""

    def would_decrypt(
        self, ciphertext: bytes | None, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> None:
        """Find out whether `decrypt` would succeed, without a plaintext being made.

        Args:
            ciphertext: None asks about key and permission alone; `key_id` is needed then.

        Raises: as `decrypt` would.
        """
        ...


class KeyService(Decrypter, Protocol):
    """Decrypts, encrypts and wraps under keys it never shows."""

    def encrypt(
        self, plaintext: bytes, *, key_id: str, encryption_context: Mapping[str, str]
    ) -> Encryption:
        """Encrypt 1 to 4096 bytes into a bare blob."""
        ...

    def re_encrypt(
        self,
        ciphertext: bytes,
        *,
        source_key_id: str | None,
        key_id: str,
        encryption_context: Mapping[str, str],
    ) -> ReEncryption:
        """Encrypt what a blob of 1 to 6144 bytes holds under `key_id`; KMS shows it to nobody.

        Args:
            source_key_id: the key that it is under; None lets KMS take it from the blob.
            encryption_context: of the blob, and of the new one.

        Raises:
            IncorrectKey: another key than `source_key_id` encrypted the blob.
            CiphertextInvalid: not authentic, or another encryption context.
        """
        ...

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """A new data key of `size_bytes` (1 to 1024), plain and wrapped under `key_id`."""
        ...

    def resolve_key_arn(self, key_id: str) -> str:
        """The key ARN that an ARN, alias or key id stands for (DescribeKey)."""
        ...
