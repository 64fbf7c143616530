"""What a ciphertext file tells of itself without KMS: format, plaintext size, key, binding."""

import os
from dataclasses import dataclass
from typing import Final

from kmsfs.errors import CiphertextInvalid
from kmsfs.formats import kms_blob
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, detect
from kmsfs.formats.esdk_header import (
    MAX_HEADER_BYTES,
    EsdkHeader,
    HeaderIncomplete,
    parse_header,
    plaintext_size_bytes,
)

# (dev, ino, size, mtime_ns, ctime_ns): a file with the same five is taken to be unchanged.
FileVersion = tuple[int, int, int, int, int]

# Enough for the headers that kmsfs writes; a larger one is read again, whole.
_PREFIX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class CiphertextFacts:
    """One version of a file, seen from outside.

    Attributes:
        size_bytes: of the plaintext; an estimate unless `size_exact`.
        key: what counts as one key when calls are limited.
        bound: whether its (not yet verified) encryption context names a place.
        problem: why it can never be decrypted; empty if nothing is known against it.
    """

    version: FileVersion
    format: Format
    size_bytes: int
    size_exact: bool
    key: str
    bound: bool
    problem: str


def version_of(info: os.stat_result) -> FileVersion:
    """The version that a stat shows."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def read_facts(fd: int, version: FileVersion) -> CiphertextFacts:
    """Read what an open file of this version says of itself.

    Raises:
        OSError: the disk says no.
    """
    total_bytes = version[2]
    prefix = os.pread(fd, _PREFIX_BYTES, 0)
    found = detect(prefix)
    if found is Format.ESDK:
        return _esdk_facts(fd, version, prefix)
    problem = ""
    estimate: int | None = None
    if total_bytes == 0:
        problem = "empty, as a failed `aws kms encrypt | base64 --decode` leaves it"
    elif total_bytes <= _max_blob_file_bytes(found):
        estimate = kms_blob.estimate_plaintext_size(prefix + os.pread(fd, total_bytes, len(prefix)))
    elif found is not Format.UNKNOWN:
        problem = f"{total_bytes} bytes are more than a KMS ciphertext blob can have"
    return CiphertextFacts(
        version=version,
        format=found,
        size_bytes=total_bytes if estimate is None else estimate,
        size_exact=False,
        key="bare",
        bound=False,
        problem=problem,
    )


def _max_blob_file_bytes(found: Format) -> int:
    # Base64 takes four characters for three bytes, and line ends.
    return kms_blob.MAX_CIPHERTEXT_BYTES * (2 if found is Format.KMS_BLOB_BASE64 else 1)


def _esdk_facts(fd: int, version: FileVersion, prefix: bytes) -> CiphertextFacts:
    total_bytes = version[2]
    header: EsdkHeader | None = None
    size_bytes, problem = 0, ""
    try:
        try:
            header = parse_header(prefix)
        except HeaderIncomplete:
            header = parse_header(os.pread(fd, MAX_HEADER_BYTES, 0))
        size_bytes = plaintext_size_bytes(
            header, total_bytes, lambda offset, count: os.pread(fd, count, offset)
        )
    except HeaderIncomplete:
        problem = "truncated in its header"
    except CiphertextInvalid as error:
        problem = error.detail
    return CiphertextFacts(
        version=version,
        format=Format.ESDK,
        size_bytes=size_bytes,
        size_exact=not problem,
        key=_key_of(header),
        bound=header is not None and is_bound(header.encryption_context),
        problem=problem,
    )


def _key_of(header: EsdkHeader | None) -> str:
    if header is None:
        return ""
    return " ".join(key.key_arn or "" for key in header.encrypted_data_keys)
