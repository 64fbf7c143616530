"""Certificates and private keys in a mount: what has expired, and what does not belong together.

Nothing of a file is told but numbers, dates and what is wrong. Plaintext is wiped after it was
looked at; copies that the libraries make end with the process.
"""

import errno
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from kmsfs.manage.check import Problem

# RFC 7468; a chain of certificates has some kilobytes, a bundle of all authorities 250.
_BEGIN: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_BLOCK: Final = re.compile(_BEGIN.pattern + rb"\r?\n[^-]{1,100000}-----END \1-----")
_MAX_BYTES: Final = 1 << 20

_CERTIFICATES: Final = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE"})
_PRIVATE_KEYS: Final = frozenset(
    {b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY", b"DSA PRIVATE KEY"}
)

_UNREADABLE: Final = (ValueError, UnsupportedAlgorithm)


@dataclass(frozen=True, slots=True)
class ContentCheck:
    """A file with certificates or private keys, or one that could not be read.

    Attributes:
        expires_at: when the first of its certificates does, in UTC; None without one.
    """

    path: str
    certificates: int = 0
    private_keys: int = 0
    expires_at: datetime | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class _Pem:
    """What is needed of a file: public halves, in DER.

    Attributes:
        leaf: that of its first certificate.
        leaf_is_authority: whether that one signs others.
    """

    check: ContentCheck
    certified: tuple[bytes, ...] = ()
    private: tuple[bytes, ...] = field(default=(), repr=False)
    leaf: bytes | None = None
    leaf_is_authority: bool = False


def check_content(
    mountpoint: str, paths: Sequence[str], *, now: datetime, expires_within: timedelta
) -> tuple[ContentCheck, ...]:
    """Read files through a mount, and check those in PEM form.

    Args:
        paths: relative to the mountpoint.
        expires_within: a certificate that expires this soon is a failure.
    """
    found = []
    for path in paths:
        try:
            pem = _read(os.path.join(mountpoint, path), path, now + expires_within, now)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "OSError")
            hint = f"see `kmsfs why {os.path.join(mountpoint, path)}`"
            problem = Problem(name, error.strerror or name, hint)
            pem = _Pem(ContentCheck(path, problem=problem))
        if pem is not None:
            found.append(pem)
    return tuple(_with_partner(pem, found) for pem in found)


def _read(name: str, path: str, expired_by: datetime, now: datetime) -> _Pem | None:
    """What a file holds; None where that is nothing in PEM form.

    Raises:
        OSError: the mount says no.
    """
    buffer = bytearray(_MAX_BYTES)
    try:
        with open(name, "rb", buffering=0) as file:
            size_bytes = 0
            while count := file.readinto(memoryview(buffer)[size_bytes:]):
                size_bytes += count
        # Cut off, the last of its blocks would look damaged.
        return None if size_bytes == _MAX_BYTES else _look_at(buffer, path, expired_by, now)
    finally:
        buffer[:] = bytes(len(buffer))


def _look_at(buffer: bytearray, path: str, expired_by: datetime, now: datetime) -> _Pem | None:
    certificates: list[x509.Certificate] = []
    private: list[bytes] = []
    unreadable = ""
    with warnings.catch_warnings():
        # Of odd certificates, on standard error.
        warnings.simplefilter("ignore")
        for begin in _BEGIN.finditer(buffer):
            kind = begin[1]
            if kind not in _CERTIFICATES | _PRIVATE_KEYS:
                continue
            block = _BLOCK.match(buffer, begin.start())
            try:
                if block is None:
                    # RFC 1421, an older form of keys that have a password, has header lines.
                    if b"Proc-Type: 4,ENCRYPTED" not in buffer[begin.end() : begin.end() + 100]:
                        unreadable = kind.decode()
                elif kind in _CERTIFICATES:
                    certificates.append(x509.load_pem_x509_certificate(block[0]))
                else:
                    key = load_pem_private_key(block[0], password=None)
                    private.append(_spki(key.public_key()))
            except TypeError:
                # It has a password: nothing can be said of it.
                continue
            except _UNREADABLE:
                unreadable = kind.decode()
        if not certificates and not private and not unreadable:
            return None
        certified = tuple(_public_of(certificate) for certificate in certificates)
        leaf_is_authority = bool(certificates) and _is_authority(certificates[0])
    expires_at = min((each.not_valid_after_utc for each in certificates), default=None)
    check = ContentCheck(path, len(certificates), len(private), expires_at)
    if unreadable:
        hint = "look at its form: `openssl x509` and `openssl pkey` say more"
        check = replace(
            check,
            problem=Problem("ContentUnreadable", f"a {unreadable.lower()} in it is damaged", hint),
        )
    else:
        check = replace(check, problem=_time_problem(certificates, expired_by, now))
    return _Pem(
        check, certified, tuple(private), certified[0] if certified else None, leaf_is_authority
    )


def _time_problem(
    certificates: Sequence[x509.Certificate], expired_by: datetime, now: datetime
) -> Problem | None:
    for number, certificate in enumerate(certificates, start=1):
        which = f"certificate {number} of {len(certificates)}"
        ends, begins = certificate.not_valid_after_utc, certificate.not_valid_before_utc
        if ends <= now:
            return Problem("Expired", f"{which} expired on {_date(ends)}", "renew it")
        if ends <= expired_by:
            return Problem("ExpiresSoon", f"{which} expires on {_date(ends)}", "renew it")
        if begins > now:
            return Problem(
                "NotYetValid", f"{which} is valid from {_date(begins)} on", "check the clock"
            )
    return None


def _with_partner(pem: _Pem, found: Sequence[_Pem]) -> ContentCheck:
    """A file's check, with the certificate that should be that of its private key."""
    if not pem.private or pem.check.problem is not None:
        return pem.check
    where, certified = _partners(pem, found)
    if not certified or set(pem.private) & certified:
        return pem.check
    problem = Problem(
        "KeyMismatch",
        f"its private key is not that of the certificate in {where}",
        "encrypt the key and the certificate that belong together",
    )
    return replace(pem.check, problem=problem)


def _partners(pem: _Pem, found: Sequence[_Pem]) -> tuple[str, set[bytes]]:
    """Where the certificate of a private key should be, and the public keys there.

    In the same file; else in a file beside it that has its name and another ending; else, where
    it is the only private key of the directory, in the only certificate there that is not an
    authority's.
    """
    path = pem.check.path
    if pem.certified:
        return "the same file", set(pem.certified)
    directory, name = os.path.split(path)
    beside = [
        other
        for other in found
        if os.path.dirname(other.check.path) == directory and other is not pem
    ]
    stem = os.path.splitext(name)[0]
    for other in beside:
        other_name = os.path.basename(other.check.path)
        if other.leaf is not None and os.path.splitext(other_name)[0] == stem:
            return other_name, {other.leaf}
    if any(other.private for other in beside):
        return "", set()
    leaves = {
        other.leaf: os.path.basename(other.check.path)
        for other in beside
        if other.leaf is not None and not other.leaf_is_authority
    }
    if len(leaves) != 1:
        return "", set()
    ((leaf, where),) = leaves.items()
    return where, {leaf}


def _public_of(certificate: x509.Certificate) -> bytes:
    try:
        return _spki(certificate.public_key())
    except _UNREADABLE:
        # Of a kind that no private key here is of either.
        return b""


def _spki(key: PublicKeyTypes) -> bytes:

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, *_UNREADABLE):
        return False


def _date(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d")
