"""What ciphertext files say of themselves, offline. None of it is authenticated."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from kmsfs.errors import (
    CiphertextInvalid,
    ConfigInvalid,
    ConfigUntrusted,
    InputUnreadable,
    UsageInvalid,
)
from kmsfs.formats import esdk_header, kms_blob
from kmsfs.formats.binding import check_place, is_bound
from kmsfs.formats.detect import DETECT_PREFIX_BYTES, Format, detect
from kmsfs.manage.place import VolumeHere, place_of, volume_above

Certainty = Literal["exact", "estimated", "unknown"]
Fit = Literal["fits", "does not fit", "unbound", "unknown"]


@dataclass(frozen=True, slots=True)
class Key:
    """A KMS key that a message names."""

    arn: str
    account: str
    region: str


@dataclass(frozen=True, slots=True)
class Binding:
    """Whether a file lies where its encryption context says; `detail` says more."""

    fit: Fit
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One file, as far as it can be known without a key.

    Attributes:
        keys: that wrapped the data key; empty for bare blobs, which name none.
        plaintext_size_bytes: None where `plaintext_size` is "unknown".
        problem: why it cannot be decrypted; None if nothing is known against it.
    """

    path: str
    format: Format
    size_bytes: int
    plaintext_size: Certainty = "unknown"
    plaintext_size_bytes: int | None = None
    keys: tuple[Key, ...] = ()
    encryption_context: dict[str, str] = field(default_factory=dict)
    suite: str | None = None
    committing: bool | None = None
    signed: bool | None = None
    frame_length_bytes: int | None = None
    binding: Binding = Binding("unknown")
    problem: str | None = None


_ARN_REGION: Final = 3
_ARN_ACCOUNT: Final = 4


def inspect_file(name: str) -> Inspection:
    """Look at one file.

    Raises:
        InputUnreadable: missing, not a regular file, or the disk says no.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InputUnreadable("it is not a regular file", hint="name files")
            return _inspect(name, fd, info.st_size)
        finally:
            os.close(fd)
    except OSError as error:
        raise InputUnreadable(error.strerror or type(error).__name__) from error


def _inspect(name: str, fd: int, size_bytes: int) -> Inspection:
    found = detect(os.pread(fd, DETECT_PREFIX_BYTES, 0))
    try:
        match found:
            case Format.ESDK:
                return _inspect_message(name, fd, size_bytes)
            case Format.KMS_BLOB | Format.KMS_BLOB_BASE64:
                return _inspect_blob(name, fd, size_bytes, found)
            case Format.UNKNOWN:
                problem = "it is empty" if size_bytes == 0 else "it is of no known format"
    except CiphertextInvalid as error:
        problem = error.detail
    return Inspection(name, found, size_bytes, problem=problem)


def _inspect_message(name: str, fd: int, size_bytes: int) -> Inspection:
    def read_at(offset: int, wanted_bytes: int) -> bytes:
        return os.pread(fd, wanted_bytes, offset)

    header = esdk_header.read_header(read_at, size_bytes)
    plaintext_size_bytes = None
    problem = None
    try:
        plaintext_size_bytes = esdk_header.plaintext_size_bytes(header, size_bytes, read_at)
    except CiphertextInvalid as error:
        problem = error.detail
    return Inspection(
        path=name,
        format=Format.ESDK,
        size_bytes=size_bytes,
        plaintext_size="unknown" if plaintext_size_bytes is None else "exact",
        plaintext_size_bytes=plaintext_size_bytes,
        keys=tuple(_key(arn) for arn in header.key_arns),
        encryption_context=dict(header.encryption_context),
        suite=header.suite.name,
        committing=header.suite.committing,
        signed=header.suite.signed,
        frame_length_bytes=header.frame_length_bytes,
        binding=_binding(name, dict(header.encryption_context)),
        problem=problem,
    )


def _inspect_blob(name: str, fd: int, size_bytes: int, found: Format) -> Inspection:
    most = kms_blob.MAX_BASE64_BYTES
    if found is Format.KMS_BLOB:
        most = kms_blob.MAX_CIPHERTEXT_BYTES
    if size_bytes > most:
        raise CiphertextInvalid(f"{size_bytes} bytes are too many for a KMS ciphertext blob")
    blob = os.pread(fd, size_bytes, 0)
    if found is Format.KMS_BLOB_BASE64:
        blob = kms_blob.decode_base64(blob)
    estimate = kms_blob.estimate_plaintext_size(blob)
    return Inspection(
        path=name,
        format=found,
        size_bytes=size_bytes,
        plaintext_size="unknown" if estimate is None else "estimated",
        plaintext_size_bytes=estimate,
        binding=_binding(name, {}),
    )


def _key(arn: str) -> Key:
    parts = arn.split(":")
    return Key(arn, account=parts[_ARN_ACCOUNT], region=parts[_ARN_REGION])


def _binding(name: str, context: dict[str, str]) -> Binding:
    path = Path(os.path.abspath(name))
    try:
        volume = volume_above(path.parent)
        place = place_of(path, volume)
    except (ConfigInvalid, ConfigUntrusted, UsageInvalid) as error:
        return Binding("unknown", error.detail)
    if not is_bound(context):
        return Binding("unbound", _unbound_detail(volume, place.path))
    try:
        check_place(context, place, required=True)
    except CiphertextInvalid as error:
        return Binding("does not fit", error.detail)
    return Binding("fits")


def _unbound_detail(volume: VolumeHere | None, path: str) -> str:
    if volume is None:
        return "it lies in no volume"
    if volume.may_be_unbound(path):
        return f"volume {volume.name!r} serves it all the same: it is listed under unbound"
    return f"volume {volume.name!r} does not serve it"
