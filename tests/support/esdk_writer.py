"""Encryption SDK messages written by hand, with every degree of freedom the format has.

Independent of both kmsfs and the SDK, after the developer guide's message format reference:
what the SDK never writes (full final frames, frames out of order, other signature lengths) is
written here, correctly authenticated. Committing suites only, signed or not.
"""

import base64
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SIGNED_SUITE = 0x0578
UNSIGNED_SUITE = 0x0478

_FRAME = b"AWSKMSEncryptionClient Frame"
_FINAL_FRAME = b"AWSKMSEncryptionClient Final Frame"
_SINGLE_BLOCK = b"AWSKMSEncryptionClient Single Block"
_END = 0xFFFFFFFF


@dataclass(frozen=True)
class WrittenKey:
    """An encrypted data key as it is to stand in the header."""

    provider_id: bytes
    provider_info: bytes
    ciphertext: bytes


@dataclass
class EsdkWriter:
    """Writes one message under a data key.

    Use `header`, then `frame` or `unframed`, then `footer`; or `message` for all of it.

    Attributes:
        context: pairs; `raw_context` replaces their serialization.
    """

    data_key: bytes
    keys: Sequence[WrittenKey]
    context: Mapping[str, str] = field(default_factory=dict)
    frame_length: int = 128
    signed: bool = False
    raw_context: bytes | None = None
    message_id: bytes = field(default_factory=lambda: os.urandom(32))

    def __post_init__(self) -> None:
        self.suite = SIGNED_SUITE if self.signed else UNSIGNED_SUITE
        suite = struct.pack(">H", self.suite)
        self.content_key = self._derive(suite + b"DERIVEKEY")
        self.commitment = self._derive(b"COMMITKEY")
        self.signing_key = ec.generate_private_key(ec.SECP384R1())
        self.written = b""

    def message(self, plaintext: bytes, *, full_final_frame: bool = False) -> bytes:
        """A whole message.

        Args:
            full_final_frame: end in a frame of full length where the plaintext is a multiple of
                it, as the SDK for Java does, rather than in an empty one.
        """
        self.header()
        if self.frame_length == 0:
            self.unframed(plaintext)
        else:
            count = len(plaintext) // self.frame_length
            if full_final_frame and count and len(plaintext) % self.frame_length == 0:
                count -= 1
            for index in range(count):
                start = index * self.frame_length
                self.frame(index + 1, plaintext[start : start + self.frame_length])
            self.final_frame(count + 1, plaintext[count * self.frame_length :])
        self.footer()
        return self.written

    def public_key_pair(self) -> dict[str, str]:
        """What a signed message's context holds beside the caller's pairs."""
        point = self.signing_key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        )
        return {"aws-crypto-public-key": base64.b64encode(point).decode()}

    def header(self, *, content_type: int | None = None, commitment: bytes | None = None) -> None:
        """The header and its authentication."""
        pairs = {**self.context, **(self.public_key_pair() if self.signed else {})}
        context = self.raw_context
        if context is None:
            context = b"".join(
                _counted(key.encode()) + _counted(value.encode())
                for key, value in sorted(pairs.items())
            )
            context = struct.pack(">H", len(pairs)) + context if pairs else b""
        if content_type is None:
            content_type = 2 if self.frame_length else 1
        body = (
            struct.pack(">BH", 2, self.suite)
            + self.message_id
            + _counted(context)
            + struct.pack(">H", len(self.keys))
            + b"".join(
                _counted(key.provider_id) + _counted(key.provider_info) + _counted(key.ciphertext)
                for key in self.keys
            )
            + struct.pack(">BI", content_type, self.frame_length)
            + (self.commitment if commitment is None else commitment)
        )
        self.written += body + AESGCM(self.content_key).encrypt(bytes(12), b"", body)

    def frame(self, sequence: int, content: bytes) -> None:
        """A frame that is not the last."""
        iv = struct.pack(">12s", sequence.to_bytes(12))
        sealed = self._seal(iv, content, _FRAME, sequence)
        self.written += struct.pack(">I", sequence) + iv + sealed

    def final_frame(self, sequence: int, content: bytes) -> None:
        """The last frame, of any length."""
        iv = sequence.to_bytes(12)
        sealed = self._seal(iv, content, _FINAL_FRAME, sequence)
        self.written += struct.pack(">II", _END, sequence) + iv
        self.written += struct.pack(">I", len(content)) + sealed

    def unframed(self, content: bytes) -> None:
        """A body in one piece."""
        iv = (1).to_bytes(12)
        self.written += iv + struct.pack(">Q", len(content))
        self.written += self._seal(iv, content, _SINGLE_BLOCK, 1)

    def footer(self) -> None:
        """The signature of signed messages, of whatever length it comes out."""
        if self.signed:
            signature = self.signing_key.sign(self.written, ec.ECDSA(hashes.SHA384()))
            self.written += _counted(signature)

    def _seal(self, iv: bytes, content: bytes, kind: bytes, sequence: int) -> bytes:
        aad = self.message_id + kind + struct.pack(">IQ", sequence, len(content))
        return AESGCM(self.content_key).encrypt(iv, content, aad)

    def _derive(self, info: bytes) -> bytes:
        return HKDF(hashes.SHA512(), 32, self.message_id, info).derive(self.data_key)


def _counted(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
