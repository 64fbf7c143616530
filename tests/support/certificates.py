"""Certificates and private keys in PEM form, made for one test."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

NOW = datetime.now(UTC).replace(microsecond=0)

_NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test.invalid")])


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, *, password: bytes | None = None) -> bytes:
    """A private key as files have it."""
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def certificate_pem(
    key: ec.EllipticCurvePrivateKey,
    *,
    begins: timedelta = timedelta(days=-100),
    ends: timedelta = timedelta(days=100),
    authority: bool = False,
) -> bytes:
    """A certificate that a key signed for itself; times are relative to `NOW`."""
    made = (
        x509.CertificateBuilder()
        .subject_name(_NAME)
        .issuer_name(_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins)
        .not_valid_after(NOW + ends)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM)
