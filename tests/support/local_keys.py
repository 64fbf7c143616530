"""A key service in this process, with real ciphers and KMS's own strictness.

Its blobs have the shape of today's KMS blobs: the same magic and lengths, the encrypted content
as a DER OCTET STRING in the same place. Its answers to a wrong key, a wrong context, a disabled
key and a missing permission are those of KMS.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kmsfs.errors import (
    CiphertextInvalid,
    IncorrectKey,
    KeyAccessDenied,
    KeyNotFound,
    KeyUnusable,
    KmsfsError,
)
from kmsfs.keys.service import DataKey, Decryption, Encryption, ReEncryption

REGION = "eu-central-1"
ACCOUNT = "111122223333"

_MAGIC = bytes.fromhex("0102020078")
_FINGERPRINT_AT = len(_MAGIC)
_FINGERPRINT_BYTES = 32
_DER_AT = 58
_IV_BYTES = 12
_PADDING_BYTES = 11  # with the tag's 16, the 27 bytes by which KMS's content is longer


def key_arn(number: int) -> str:
    """The ARN of the stand-in's key of this number."""
    return f"arn:aws:kms:{REGION}:{ACCOUNT}:key/00000000-0000-4000-8000-{number:012d}"


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        length = bytes((size,))
    elif size < 0x100:
        length = bytes((0x81, size))
    else:
        length = b"\x82" + size.to_bytes(2)
    return bytes((tag,)) + length + content


def _oid(text: str) -> bytes:
    return _der(0x06, bytes.fromhex(text))


def blob_of(fingerprint: bytes, iv: bytes, content: bytes) -> bytes:
    """A blob of today's shape around encrypted content; 184 bytes for a key of 32."""
    algorithm = _der(
        0x30, _oid("60864801650304012e") + _der(0x30, _der(0x04, iv) + b"\x02\x01\x10")
    )
    info = _der(0x30, _oid("2a864886f70d010701") + algorithm + _der(0x80, content))
    body = _der(
        0x30,
        _oid("2a864886f70d010706") + _der(0xA0, _der(0x30, b"\x02\x01\x00" + info)),
    )
    return _MAGIC + fingerprint + b"\x01" + bytes(16) + len(body).to_bytes(4) + body


@dataclass
class LocalKey:
    """One key, and what stands in its way."""

    arn: str
    secret: bytes = field(repr=False)
    enabled: bool = True
    denied: bool = False

    @property
    def fingerprint(self) -> bytes:
        """What stands for this key in its blobs."""
        return hashlib.sha256(self.arn.encode()).digest()


@dataclass(frozen=True)
class Call:
    """One call as the service saw it."""

    operation: str
    key_id: str | None
    context: Mapping[str, str]


class LocalKeys:
    """`KeyService` with keys 1 to `count` in memory.

    Attributes:
        keys: by ARN.
        aliases: alias name (`alias/...`) to ARN.
        calls: all calls made, in order.
        failures: key id as sent to the error that a call with it raises.
    """

    def __init__(self, count: int = 2, *, seed: bytes | None = None) -> None:
        seed = os.urandom(32) if seed is None else seed
        self.keys: dict[str, LocalKey] = {}
        for number in range(1, count + 1):
            arn = key_arn(number)
            self.keys[arn] = LocalKey(arn, hashlib.sha256(seed + arn.encode()).digest())
        self.aliases: dict[str, str] = {}
        self.calls: list[Call] = []
        self.failures: dict[str | None, KmsfsError] = {}

    def decrypt(
        self, ciphertext: bytes, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> Decryption:
        """As `KeyService.decrypt`."""
        self._note("Decrypt", key_id, encryption_context)
        fingerprint = ciphertext[_FINGERPRINT_AT : _FINGERPRINT_AT + _FINGERPRINT_BYTES]
        wrapping = [key for key in self.keys.values() if key.fingerprint == fingerprint]
        if not ciphertext.startswith(_MAGIC) or not wrapping:
            raise CiphertextInvalid("InvalidCiphertextException")
        (key,) = wrapping
        if key_id is not None and self._find(key_id) is not key:
            raise IncorrectKey(f"IncorrectKeyException: {key_id}")
        self._check(key)
        try:
            iv, content = _parts(ciphertext)
            plaintext = AESGCM(key.secret).decrypt(iv, content, _aad(encryption_context))
        except (InvalidTag, ValueError):
            raise CiphertextInvalid("InvalidCiphertextException") from None
        if ciphertext != blob_of(fingerprint, iv, content):
            raise CiphertextInvalid("InvalidCiphertextException")
        return Decryption(plaintext[_PADDING_BYTES:], key.arn)

    def encrypt(
        self, plaintext: bytes, *, key_id: str, encryption_context: Mapping[str, str]
    ) -> Encryption:
        """As `KeyService.encrypt`."""
        self._note("Encrypt", key_id, encryption_context)
        assert 1 <= len(plaintext) <= 4096
        key = self._find(key_id)
        self._check(key)
        return Encryption(self._wrap(key, plaintext, encryption_context), key.arn)

    def re_encrypt(
        self,
        ciphertext: bytes,
        *,
        source_key_id: str | None,
        key_id: str,
        encryption_context: Mapping[str, str],
    ) -> ReEncryption:
        """As `KeyService.re_encrypt`."""
        opened = self.decrypt(
            ciphertext, key_id=source_key_id, encryption_context=encryption_context
        )
        made = self.encrypt(opened.plaintext, key_id=key_id, encryption_context=encryption_context)
        return ReEncryption(made.ciphertext, made.key_arn, opened.key_arn)

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """As `KeyService.generate_data_key`."""
        self._note("GenerateDataKey", key_id, encryption_context)
        assert 1 <= size_bytes <= 1024
        key = self._find(key_id)
        self._check(key)
        plaintext = os.urandom(size_bytes)
        return DataKey(plaintext, self._wrap(key, plaintext, encryption_context), key.arn)

    def resolve_key_arn(self, key_id: str) -> str:
        """As `KeyService.resolve_key_arn`."""
        self._note("DescribeKey", key_id, {})
        return self._find(key_id).arn

    def _note(self, operation: str, key_id: str | None, context: Mapping[str, str]) -> None:
        self.calls.append(Call(operation, key_id, dict(context)))
        if key_id in self.failures:
            raise self.failures[key_id]

    def _find(self, key_id: str) -> LocalKey:
        name = key_id.split(":", 5)[5] if key_id.startswith("arn:") else key_id
        arn = self.aliases.get(name, f"arn:aws:kms:{REGION}:{ACCOUNT}:key/{name}")
        if key_id.startswith("arn:") and ":alias/" not in key_id:
            arn = key_id
        if arn not in self.keys:
            raise KeyNotFound(f"NotFoundException: {key_id}")
        return self.keys[arn]

    def _check(self, key: LocalKey) -> None:
        if key.denied:
            raise KeyAccessDenied(f"AccessDeniedException: {key.arn}")
        if not key.enabled:
            raise KeyUnusable(f"DisabledException: {key.arn}")

    def _wrap(self, key: LocalKey, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        iv = os.urandom(_IV_BYTES)
        padded = bytes(_PADDING_BYTES) + plaintext
        return blob_of(key.fingerprint, iv, AESGCM(key.secret).encrypt(iv, padded, _aad(context)))


def _aad(context: Mapping[str, str]) -> bytes:
    return json.dumps(dict(context), sort_keys=True).encode()


def _parts(blob: bytes) -> tuple[bytes, bytes]:
    """IV and encrypted content; a blob taken apart wrongly fails its authentication."""
    marker = b"\x30\x11\x04\x0c"
    iv_at = blob.index(marker, _DER_AT) + len(marker)
    iv = blob[iv_at : iv_at + _IV_BYTES]
    length_at = iv_at + _IV_BYTES + len(b"\x02\x01\x10") + 1
    first = blob[length_at : length_at + 1]
    if not first:
        raise ValueError("cut short")
    octets = first[0] & 0x7F if first[0] & 0x80 else 0
    return iv, blob[length_at + 1 + octets :]
