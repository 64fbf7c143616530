"""AWS Encryption SDK messages without keys: header, key, context and exact plaintext size.

Pure parsing of what the message says of itself, after the AWS Encryption SDK Developer Guide,
"AWS Encryption SDK message format reference". Nothing here is authenticated until the message
is decrypted; the decryption holds what it authenticates against what was parsed here.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kmsfs.errors import CiphertextInvalid

Buffer = bytes | bytearray | memoryview
ReadAt = Callable[[int, int], bytes]
"""(offset, size) in bytes; what is returned is shorter at the end of the message only."""

KMS_PROVIDER_ID: Final = "aws-kms"

# Strict, because it is shown to people and sent to KMS; and ASCII, whatever the file says.
_KEY_ARN: Final = re.compile(r"arn:[a-z0-9-]+:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+")

# A full encryption context (64 KiB) and as much again for data keys, one of which takes some
# 300 bytes. The format itself has no bound worth the name.
MAX_HEADER_BYTES: Final = 128 << 10
MAX_ENCRYPTED_DATA_KEYS: Final = 64

# One page: enough for the header of nearly every message.
FIRST_READ_BYTES: Final = 4096

IV_BYTES: Final = 12
TAG_BYTES: Final = 16
_COMMITMENT_BYTES: Final = 32

MAX_FRAME_LENGTH_BYTES: Final = (1 << 31) - 1
MAX_UNFRAMED_BYTES: Final = (1 << 36) - 32

_FORMAT_V1: Final = 1
_FORMAT_V2: Final = 2
_TYPE_CUSTOMER_DATA: Final = 0x80
_UNFRAMED: Final = 1
_FRAMED: Final = 2

_FINAL_FRAME: Final = 0xFFFFFFFF
_FINAL_FRAME_HEAD: Final = struct.Struct(f">II{IV_BYTES}sI")
_UNFRAMED_HEAD: Final = struct.Struct(f">{IV_BYTES}sQ")
_FRAME_OVERHEAD_BYTES: Final = 4 + IV_BYTES + TAG_BYTES
_FOOTER_HEAD_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Suite:
    """An algorithm suite. All of them are AES-GCM with 12-byte IVs and 16-byte tags.

    Attributes:
        id: as in the header.
        name: as in the developer guide.
        format_version: of the messages that carry it.
        key_bytes: length of its data keys.
        max_signature_bytes: of its DER-encoded ECDSA signatures; 0 for unsigned suites.
    """

    id: int
    name: str
    format_version: int
    key_bytes: int
    max_signature_bytes: int = 0

    @property
    def signed(self) -> bool:
        """Whether messages end in a signature."""
        return self.max_signature_bytes > 0

    @property
    def committing(self) -> bool:
        """Whether the message commits to one data key."""
        return self.format_version == _FORMAT_V2


# An ECDSA signature is a DER sequence of two integers of at most (curve bytes + 1) each.
_P256_SIGNATURE_BYTES: Final = 72
_P384_SIGNATURE_BYTES: Final = 104

SUITES: Final[Mapping[int, Suite]] = {
    suite.id: suite
    for suite in (
        Suite(0x0014, "AES_128_GCM_IV12_TAG16", 1, 16),
        Suite(0x0046, "AES_192_GCM_IV12_TAG16", 1, 24),
        Suite(0x0078, "AES_256_GCM_IV12_TAG16", 1, 32),
        Suite(0x0114, "AES_128_GCM_IV12_TAG16_HKDF_SHA256", 1, 16),
        Suite(0x0146, "AES_192_GCM_IV12_TAG16_HKDF_SHA256", 1, 24),
        Suite(0x0178, "AES_256_GCM_IV12_TAG16_HKDF_SHA256", 1, 32),
        Suite(
            0x0214,
            "AES_128_GCM_IV12_TAG16_HKDF_SHA256_ECDSA_P256",
            1,
            16,
            _P256_SIGNATURE_BYTES,
        ),
        Suite(
            0x0346,
            "AES_192_GCM_IV12_TAG16_HKDF_SHA384_ECDSA_P384",
            1,
            24,
            _P384_SIGNATURE_BYTES,
        ),
        Suite(
            0x0378,
            "AES_256_GCM_IV12_TAG16_HKDF_SHA384_ECDSA_P384",
            1,
            32,
            _P384_SIGNATURE_BYTES,
        ),
        Suite(0x0478, "AES_256_GCM_HKDF_SHA512_COMMIT_KEY", 2, 32),
        Suite(
            0x0578,
            "AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384",
            2,
            32,
            _P384_SIGNATURE_BYTES,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class EncryptedDataKey:
    """The message's data key, wrapped under one key of one provider."""

    provider_id: str
    provider_info: bytes
    ciphertext: bytes

    @property
    def key_arn(self) -> str | None:
        """ARN of the KMS key that wrapped it; None for another provider or no key's ARN."""
        if self.provider_id != KMS_PROVIDER_ID:
            return None
        arn = self.provider_info.decode("ascii", errors="replace")
        return arn if _KEY_ARN.fullmatch(arn) else None


@dataclass(frozen=True, slots=True)
class EsdkHeader:
    """A message's header, as parsed.

    Attributes:
        encrypted_data_keys: 1 to MAX_ENCRYPTED_DATA_KEYS, in the message's order.
        frame_length_bytes: plaintext bytes of every frame but the last; 0 if unframed.
        length_bytes: of the whole header with its authentication; the body starts there.
    """

    suite: Suite
    message_id: bytes
    encryption_context: Mapping[str, str]
    encrypted_data_keys: tuple[EncryptedDataKey, ...]
    frame_length_bytes: int
    length_bytes: int

    @property
    def framed(self) -> bool:
        """Whether the body is cut into frames."""
        return self.frame_length_bytes > 0

    @property
    def key_arns(self) -> tuple[str, ...]:
        """The KMS keys that wrapped the data key, in the message's order."""
        return tuple(arn for key in self.encrypted_data_keys if (arn := key.key_arn) is not None)


class HeaderIncomplete(Exception):
    """The prefix ends within the header.

    Attributes:
        needed_bytes: the least length of a prefix with which parsing gets further; never more
            than MAX_HEADER_BYTES.
    """

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"the header takes at least {needed_bytes} bytes")
        self.needed_bytes: Final = needed_bytes


class _Reader:
    """Reads fields off a prefix and knows where it is."""

    def __init__(self, prefix: Buffer) -> None:
        self._data = memoryview(prefix)
        self.offset = 0

    def take(self, size_bytes: int) -> bytes:
        end = self.offset + size_bytes
        if end > MAX_HEADER_BYTES:
            raise CiphertextInvalid(f"the header is longer than {MAX_HEADER_BYTES} bytes")
        if end > len(self._data):
            raise HeaderIncomplete(end)
        field = bytes(self._data[self.offset : end])
        self.offset = end
        return field

    def take_int(self, size_bytes: int) -> int:
        return int.from_bytes(self.take(size_bytes))

    def take_counted(self) -> bytes:
        return self.take(self.take_int(2))


def parse_header(prefix: Buffer) -> EsdkHeader:
    """Parse the header of a message that begins with `prefix`.

    Raises:
        HeaderIncomplete: more of the message is needed.
        CiphertextInvalid: no message begins like this.
    """
    reader = _Reader(prefix)
    version = reader.take_int(1)
    if version not in (_FORMAT_V1, _FORMAT_V2):
        raise CiphertextInvalid(f"no Encryption SDK message has format version {version}")
    if version == _FORMAT_V1 and (kind := reader.take_int(1)) != _TYPE_CUSTOMER_DATA:
        raise CiphertextInvalid(f"no Encryption SDK message is of type {kind:#04x}")
    suite_id = reader.take_int(2)
    suite = SUITES.get(suite_id)
    if suite is None or suite.format_version != version:
        raise CiphertextInvalid(f"no suite {suite_id:#06x} in message format version {version}")
    message_id = reader.take(16 if version == _FORMAT_V1 else 32)
    context = _parse_context(reader.take_counted())
    data_keys = _parse_data_keys(reader)
    content_type = reader.take_int(1)
    if content_type not in (_UNFRAMED, _FRAMED):
        raise CiphertextInvalid(f"no content type {content_type}")
    if version == _FORMAT_V1:
        if reader.take_int(4) != 0:
            raise CiphertextInvalid("the header's reserved bytes are not zero")
        if (iv_bytes := reader.take_int(1)) != IV_BYTES:
            raise CiphertextInvalid(f"an IV length of {iv_bytes} where {IV_BYTES} is due")
    frame_length = reader.take_int(4)
    least, most = (1, MAX_FRAME_LENGTH_BYTES) if content_type == _FRAMED else (0, 0)
    if not least <= frame_length <= most:
        raise CiphertextInvalid(f"content type {content_type} with frames of {frame_length} bytes")
    reader.take((IV_BYTES if version == _FORMAT_V1 else _COMMITMENT_BYTES) + TAG_BYTES)
    return EsdkHeader(
        suite=suite,
        message_id=message_id,
        encryption_context=context,
        encrypted_data_keys=data_keys,
        frame_length_bytes=frame_length,
        length_bytes=reader.offset,
    )


def read_header(read_at: ReadAt, total_bytes: int) -> EsdkHeader:
    """Parse the header of a message of `total_bytes`, reading as little of it as it takes.

    Raises:
        CiphertextInvalid: no message begins like this, or it is cut short.
    """
    wanted = FIRST_READ_BYTES
    while True:
        prefix = read_at(0, min(wanted, total_bytes))
        try:
            return parse_header(prefix)
        except HeaderIncomplete as incomplete:
            if incomplete.needed_bytes > total_bytes or len(prefix) < min(wanted, total_bytes):
                raise CiphertextInvalid("the message ends within its header") from None
            wanted = min(max(incomplete.needed_bytes, 2 * wanted), MAX_HEADER_BYTES)


def plaintext_size_bytes(header: EsdkHeader, total_bytes: int, read_at: ReadAt) -> int:
    """The exact plaintext length of a message of `total_bytes`, by arithmetic on its frames.

    Reads a handful of bytes near the end, whatever the message's length.

    Raises:
        CiphertextInvalid: the message is cut short, or bytes follow its end.
    """
    body_bytes = total_bytes - header.length_bytes
    if header.framed:
        return _framed_size(header, body_bytes, read_at)
    return _unframed_size(header, body_bytes, read_at)


def _parse_context(data: bytes) -> dict[str, str]:
    if not data:
        return {}
    context: dict[str, str] = {}
    reader = _Reader(data)
    try:
        for _ in range(reader.take_int(2)):
            key = reader.take_counted().decode()
            value = reader.take_counted().decode()
            if key in context:
                raise CiphertextInvalid("the encryption context names a key twice")
            context[key] = value
    except HeaderIncomplete:
        raise CiphertextInvalid("the encryption context is cut short") from None
    except UnicodeDecodeError:
        raise CiphertextInvalid("the encryption context is not in UTF-8") from None
    if reader.offset != len(data):
        raise CiphertextInvalid("bytes follow the encryption context's last pair")
    return context


def _parse_data_keys(reader: _Reader) -> tuple[EncryptedDataKey, ...]:
    count = reader.take_int(2)
    if not 1 <= count <= MAX_ENCRYPTED_DATA_KEYS:
        raise CiphertextInvalid(f"{count} data keys, where 1 to {MAX_ENCRYPTED_DATA_KEYS} are due")
    keys: list[EncryptedDataKey] = []
    for _ in range(count):
        try:
            provider_id = reader.take_counted().decode()
        except UnicodeDecodeError:
            raise CiphertextInvalid("a key provider's name is not in UTF-8") from None
        keys.append(EncryptedDataKey(provider_id, reader.take_counted(), reader.take_counted()))
    return tuple(keys)


def _framed_size(header: EsdkHeader, body_bytes: int, read_at: ReadAt) -> int:
    """Try each number of full frames that the body's length allows; few ever do.

    What is left after them is the final frame's overhead, at most one frame of content, and the
    footer.
    """
    frame_bytes = header.frame_length_bytes + _FRAME_OVERHEAD_BYTES
    final_overhead = _FINAL_FRAME_HEAD.size + TAG_BYTES
    least_rest = final_overhead + (_FOOTER_HEAD_BYTES if header.suite.signed else 0)
    most_rest = least_rest + header.frame_length_bytes + header.suite.max_signature_bytes
    first = max(0, -(-(body_bytes - most_rest) // frame_bytes))
    last = min((body_bytes - least_rest) // frame_bytes, _FINAL_FRAME - 2)
    for full_frames in range(first, last + 1):
        offset = full_frames * frame_bytes
        head = read_at(header.length_bytes + offset, _FINAL_FRAME_HEAD.size)
        if len(head) < _FINAL_FRAME_HEAD.size:
            break
        end_mark, sequence, _, content_bytes = _FINAL_FRAME_HEAD.unpack(head)
        if (
            end_mark == _FINAL_FRAME
            and sequence == full_frames + 1
            and content_bytes <= header.frame_length_bytes
            and _is_footer(header, offset + final_overhead + content_bytes, body_bytes, read_at)
        ):
            return int(full_frames * header.frame_length_bytes + content_bytes)
    raise CiphertextInvalid("the message is cut short, or bytes follow its end")


def _unframed_size(header: EsdkHeader, body_bytes: int, read_at: ReadAt) -> int:
    head = read_at(header.length_bytes, _UNFRAMED_HEAD.size)
    if len(head) == _UNFRAMED_HEAD.size:
        _, content_bytes = _UNFRAMED_HEAD.unpack(head)
        end = _UNFRAMED_HEAD.size + content_bytes + TAG_BYTES
        if content_bytes <= MAX_UNFRAMED_BYTES and _is_footer(header, end, body_bytes, read_at):
            return int(content_bytes)
    raise CiphertextInvalid("the message is cut short, or bytes follow its end")


def _is_footer(header: EsdkHeader, offset: int, body_bytes: int, read_at: ReadAt) -> bool:
    """Whether what lies between `offset` in the body and its end is exactly a footer."""
    rest = body_bytes - offset
    if not header.suite.signed:
        return rest == 0
    if not _FOOTER_HEAD_BYTES < rest <= _FOOTER_HEAD_BYTES + header.suite.max_signature_bytes:
        return False
    signature_bytes = read_at(header.length_bytes + offset, _FOOTER_HEAD_BYTES)
    return int.from_bytes(signature_bytes) == rest - _FOOTER_HEAD_BYTES
