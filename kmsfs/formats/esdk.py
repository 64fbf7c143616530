"""AWS Encryption SDK messages: encrypting and decrypting, given a data key or one who wraps it.

For workers and commands only: importing this imports the AWS Encryption SDK and, through it,
boto3. Which key may be asked, and asking it, is the caller's business.

The SDK logs tracebacks and, at DEBUG, plaintext, under the logger "aws_encryption_sdk". A
process that imports this module must keep that logger from every handler and never lower its
level; it is done where each process is composed.
"""

import binascii
import io
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import aws_encryption_sdk
from aws_encryption_sdk.exceptions import AWSEncryptionSDKClientError
from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy
from aws_encryption_sdk.key_providers.base import (
    MasterKey,
    MasterKeyConfig,
    MasterKeyProvider,
    MasterKeyProviderConfig,
)
from aws_encryption_sdk.structures import DataKey, MasterKeyInfo
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm

from kmsfs.errors import CiphertextInvalid, PlaintextTooLarge
from kmsfs.formats.esdk_header import KMS_PROVIDER_ID, EsdkHeader

# 16 times the SDK's default: its work per frame outweighs the cipher's below this size.
FRAME_LENGTH_BYTES: Final = 64 << 10

# The message format counts frames in 32 bits; this stays far below and bounds memory, for a
# message is built in one piece.
MAX_PLAINTEXT_BYTES: Final = 1 << 30

RESERVED_CONTEXT_PREFIX: Final = "aws-crypto-"
"""The SDK keeps encryption context keys that begin so for itself."""

_WRITTEN_SUITE: Final = AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384

# What the SDK and the cryptography library raise on bytes that are not a valid message. The
# built-in ones come from points that are not on their curve and from garbled base64 and text.
_INVALID_MESSAGE: Final = (
    AWSEncryptionSDKClientError,
    InvalidSignature,
    InvalidTag,
    UnsupportedAlgorithm,
    binascii.Error,
    struct.error,
    KeyError,
    IndexError,
    ValueError,
    OverflowError,
)


class WrappedDataKey(Protocol):
    """A new data key, plain and wrapped, and the ARN of the key that wrapped it."""

    @property
    def plaintext(self) -> bytes: ...
    @property
    def ciphertext(self) -> bytes: ...
    @property
    def key_arn(self) -> str: ...


WrapDataKey = Callable[[int, Mapping[str, str]], WrappedDataKey]
"""(size in bytes, encryption context) to a new data key, wrapped under that context."""


def decrypt_message(
    ciphertext: bytes, header: EsdkHeader, data_key: bytes, out: memoryview
) -> None:
    """Decrypt a whole message and verify all of it: tags, order, signature and end.

    Args:
        ciphertext: the message, from its first byte to its last.
        header: as parsed from it.
        data_key: unwrapped from one of the header's encrypted data keys.
        out: receives the plaintext, whose exact length it must have. On an error it holds
            bytes that are not to be released; the caller wipes them.

    Raises:
        CiphertextInvalid: not authentic, out of order, cut short, followed by other bytes, or
            not of the announced length.
    """
    source = io.BytesIO(ciphertext)
    client = aws_encryption_sdk.EncryptionSDKClient(commitment_policy=_policy(header))
    stream = client.stream(
        mode="decrypt", source=source, key_provider=_Unwrapped(header=header, data_key=data_key)
    )
    # The plaintext is asked for in pieces that the SDK hands out without copying the rest along:
    # a frame at a time, or all of an unframed body. One byte more than that makes it read the
    # footer of an empty one too.
    piece_bytes = header.frame_length_bytes if header.framed else len(out) + 1
    written = 0
    try:
        while piece := stream.read(piece_bytes):
            if written + len(piece) > len(out):
                raise CiphertextInvalid("more plaintext than the frames announce")
            out[written : written + len(piece)] = piece
            written += len(piece)
        # Refuses a message whose footer, and so whose signature, was not reached.
        stream.close()
    except _INVALID_MESSAGE as error:
        raise CiphertextInvalid(f"not authentic ({type(error).__name__})") from None
    finally:
        # The SDK's own close raises without closing; this keeps it from being called again.
        io.IOBase.close(stream)
    if written != len(out):
        raise CiphertextInvalid("less plaintext than the frames announce")
    if source.tell() != len(ciphertext):
        raise CiphertextInvalid("bytes follow the end of the message")


def encrypt_message(
    plaintext: bytes,
    *,
    wrap: WrapDataKey,
    encryption_context: Mapping[str, str],
    frame_length_bytes: int = FRAME_LENGTH_BYTES,
) -> bytes:
    """Encrypt into a message with key commitment and signature, under a new data key.

    Args:
        wrap: called once, with the context and the public key that the SDK adds to it.
        frame_length_bytes: a multiple of 128; 0 writes an unframed message.

    Raises:
        PlaintextTooLarge: more than MAX_PLAINTEXT_BYTES.
        KmsfsError: whatever `wrap` raises.
    """
    if len(plaintext) > MAX_PLAINTEXT_BYTES:
        raise PlaintextTooLarge(f"{len(plaintext)} bytes, {MAX_PLAINTEXT_BYTES} at most")
    client = aws_encryption_sdk.EncryptionSDKClient(
        commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    )
    stream = client.stream(
        mode="encrypt",
        source=io.BytesIO(plaintext),
        source_length=len(plaintext),
        key_provider=_Wrapping(key_id="", wrap=wrap),
        encryption_context=dict(encryption_context),
        algorithm=_WRITTEN_SUITE,
        frame_length=frame_length_bytes,
    )
    with io.BytesIO() as message:
        while piece := stream.read(max(frame_length_bytes, FRAME_LENGTH_BYTES)):
            message.write(piece)
        stream.close()
        return message.getvalue()


def _policy(header: EsdkHeader) -> CommitmentPolicy:
    # Whether a suite without commitment is allowed was decided before a key was asked.
    if header.suite.committing:
        return CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    return CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT


class _Unwrapped(MasterKeyProvider):  # type: ignore[misc]  # the SDK comes without types
    """Gives the SDK a data key that was unwrapped before."""

    provider_id = KMS_PROVIDER_ID
    _config_class = MasterKeyProviderConfig

    def __new__(cls, **_: Any) -> "_Unwrapped":
        provider: _Unwrapped = super().__new__(cls)
        return provider

    def __init__(self, *, header: EsdkHeader, data_key: bytes) -> None:
        self._header = header
        self._data_key = data_key

    def _new_master_key(self, key_id: bytes) -> MasterKey:
        raise NotImplementedError(f"no master key is made of {key_id!r}")

    def decrypt_data_key_from_list(
        self, encrypted_data_keys: Any, algorithm: Any, encryption_context: Any
    ) -> DataKey:
        """The data key, if the SDK read the same header as this module's caller."""
        parsed = {
            (key.provider_id, key.provider_info, key.ciphertext)
            for key in self._header.encrypted_data_keys
        }
        read = {
            (key.key_provider.provider_id, key.key_provider.key_info, key.encrypted_data_key)
            for key in encrypted_data_keys
        }
        if (algorithm.algorithm_id, encryption_context, read) != (
            self._header.suite.id,
            self._header.encryption_context,
            parsed,
        ):
            raise CiphertextInvalid("the header can be read in more than one way")
        first = next(iter(encrypted_data_keys))
        return DataKey(
            key_provider=first.key_provider,
            data_key=self._data_key,
            encrypted_data_key=first.encrypted_data_key,
        )


class _Wrapping(MasterKey):  # type: ignore[misc]  # the SDK comes without types
    """Has new data keys wrapped by the caller."""

    class _Config(MasterKeyConfig):  # type: ignore[misc]  # the SDK comes without types
        provider_id = KMS_PROVIDER_ID

    provider_id = KMS_PROVIDER_ID
    _config_class = _Config

    def __new__(cls, *, key_id: str, **_: Any) -> "_Wrapping":
        key: _Wrapping = super().__new__(cls, key_id=key_id)
        return key

    def __init__(self, *, wrap: WrapDataKey, **_: Any) -> None:
        self._wrap = wrap

    def _generate_data_key(self, algorithm: Any, encryption_context: Mapping[str, str]) -> DataKey:
        key = self._wrap(algorithm.kdf_input_len, encryption_context)
        return DataKey(
            key_provider=MasterKeyInfo(self.provider_id, key.key_arn),
            data_key=key.plaintext,
            encrypted_data_key=key.ciphertext,
        )

    def _encrypt_data_key(self, data_key: Any, algorithm: Any, encryption_context: Any) -> DataKey:
        raise NotImplementedError("a message of ours has one encrypted data key")

    def _decrypt_data_key(
        self, encrypted_data_key: Any, algorithm: Any, encryption_context: Any
    ) -> DataKey:
        raise NotImplementedError("this key is for encrypting only")
