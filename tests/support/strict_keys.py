"""Keys of the strict stand-in for KMS, and ciphertext blobs in the shape of KMS's own.

A blob of today: 5 bytes of magic, 32 bytes that stand for the key, a byte 01 and 16 bytes from
which the data key is derived, the length of what follows in 4 bytes, and a CMS EncryptedData in
DER whose encrypted content is 27 octets longer than the plaintext. Samples published by others
have this layout; how KMS fills it is its own secret, and the ciphers here are ours.
"""

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAGICS = (bytes.fromhex("0102020078"), bytes.fromhex("0102030078"))

_FINGERPRINT_BYTES = 32
_NONCE_BYTES = 16
_IV_BYTES = 12
_CLEAR_BYTES = len(MAGICS[0]) + _FINGERPRINT_BYTES + 1 + _NONCE_BYTES

# With the 16 bytes of the tag these make the 27.
_LEAD = b"\x30\x09stand-in\x04"

_OID_ENCRYPTED_DATA = bytes.fromhex("06092a864886f70d010706")
_OID_DATA = bytes.fromhex("06092a864886f70d010701")
_OID_AES256_GCM = bytes.fromhex("060960864801650304012e")


class BlobInvalidError(Exception):
    """Not a blob, or not authentic under this key and encryption context."""


@dataclass(eq=False)
class KmsKey:
    """One key.

    Attributes:
        state: a KeyState of the service model, such as `Enabled` or `PendingDeletion`.
        usage: `ENCRYPT_DECRYPT`, or anything else to have it unusable for encryption.
        latency_s: what every operation with this key takes.
        magic: how its blobs begin.
        policy: as it was set; None for a key that its whole account may use.
        rotation: whether its material is renewed each year.
    """

    account: str
    region: str
    key_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "Enabled"
    usage: str = "ENCRYPT_DECRYPT"
    latency_s: float = 0.0
    magic: bytes = MAGICS[0]
    description: str = ""
    multi_region: bool = False
    policy: str | None = None
    rotation: bool = False
    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    @property
    def arn(self) -> str:
        """Its key ARN."""
        return f"arn:aws:kms:{self.region}:{self.account}:key/{self.key_id}"

    @property
    def fingerprint(self) -> bytes:
        """What stands for it in its blobs."""
        return hashlib.sha256(b"stand-in key\0" + self.arn.encode()).digest()

    def seal(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt into a blob."""
        clear = self.magic + self.fingerprint + b"\x01" + os.urandom(_NONCE_BYTES)
        iv = os.urandom(_IV_BYTES)
        content = self._cipher(clear).encrypt(iv, _LEAD + plaintext, clear + canonical(context))
        body = _encrypted_data(iv, content)
        return clear + len(body).to_bytes(4) + body

    def open(self, blob: bytes, context: Mapping[str, str]) -> bytes:
        """Decrypt a blob of `seal`.

        Raises:
            BlobInvalidError: a byte or the context differs.
        """
        clear, iv, content = _take_apart(blob)
        try:
            opened = self._cipher(clear).decrypt(iv, content, clear + canonical(context))
        except InvalidTag:
            raise BlobInvalidError from None
        if not opened.startswith(_LEAD):
            raise BlobInvalidError
        return opened[len(_LEAD) :]

    def _cipher(self, clear: bytes) -> AESGCM:
        derive = HKDF(hashes.SHA256(), 32, salt=None, info=clear[-_NONCE_BYTES:])
        return AESGCM(derive.derive(self.secret))


def fingerprint_of(blob: bytes) -> bytes:
    """What stands for the key in a blob.

    Raises:
        BlobInvalidError: these bytes are no blob.
    """
    clear, _, _ = _take_apart(blob)
    return clear[len(MAGICS[0]) : len(MAGICS[0]) + _FINGERPRINT_BYTES]


def canonical(context: Mapping[str, str]) -> bytes:
    """An encryption context as bytes, different for different contexts."""
    parts = []
    for key, value in sorted((k.encode(), v.encode()) for k, v in context.items()):
        parts += [len(key).to_bytes(4), key, len(value).to_bytes(4), value]
    return b"".join(parts)


def _encrypted_data(iv: bytes, content: bytes) -> bytes:
    parameters = _der(0x30, _der(0x04, iv) + b"\x02\x01\x10")
    algorithm = _der(0x30, _OID_AES256_GCM + parameters)
    info = _der(0x30, _OID_DATA + algorithm + _der(0x80, content))
    return _der(0x30, _OID_ENCRYPTED_DATA + _der(0xA0, _der(0x30, b"\x02\x01\x00" + info)))


def _take_apart(blob: bytes) -> tuple[bytes, bytes, bytes]:
    """Clear part, IV and encrypted content; the rest must be what `_encrypted_data` writes."""
    clear, length, body = blob[:_CLEAR_BYTES], blob[_CLEAR_BYTES:][:4], blob[_CLEAR_BYTES + 4 :]
    if not clear.startswith(MAGICS) or len(body) != int.from_bytes(length) or not body:
        raise BlobInvalidError
    marker = b"\x30\x11\x04\x0c"
    at = body.find(marker) + len(marker)
    iv = body[at : at + _IV_BYTES]
    for head_bytes in (2, 3, 4):
        content = body[at + _IV_BYTES + 3 + head_bytes :]
        if body == _encrypted_data(iv, content):
            return clear, iv, content
    raise BlobInvalidError


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(length))) + length + content
