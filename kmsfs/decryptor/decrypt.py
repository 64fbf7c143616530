"""One ciphertext to plaintext, under rules: format, place, key, decryption, verification.

What may go wrong without a key goes wrong before KMS is asked: format, size, suite, binding,
required pairs, allow-list. Those parts of an Encryption SDK header are not yet authentic then;
its decryption, which comes after, authenticates exactly the header that was checked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    AlgorithmNotAllowed,
    CiphertextInvalid,
    CredentialsUnavailable,
    DeadlineExceeded,
    FileTooLarge,
    FormatUnknown,
    IncorrectKey,
    KeyAccessDenied,
    KeyNotAllowed,
    KeyNotFound,
    KeyUnusable,
    KmsAnswerInvalid,
    KmsfsError,
    KmsUnreachable,
    NotBound,
    RegionUnknown,
)
from kmsfs.formats import esdk, esdk_header, kms_blob
from kmsfs.formats.binding import bound_version, check_pairs, check_place
from kmsfs.formats.detect import Format, detect
from kmsfs.formats.esdk_header import EncryptedDataKey, EsdkHeader
from kmsfs.keys.service import Decrypter, Decryption
from kmsfs.kms_call import KmsCall

Allocate = Callable[[int], memoryview]
"""A writable buffer of exactly this many bytes, for plaintext."""

# Of several data keys' failures the first of these is told: what a person can act on, and what
# may pass by itself, before what is only a consequence of trying keys in turn.
_MOST_TELLING: Final[Sequence[type[KmsfsError]]] = (
    KmsUnreachable,
    KmsAnswerInvalid,
    KeyUnusable,
    KeyAccessDenied,
    RegionUnknown,
    KeyNotFound,
    CiphertextInvalid,
    IncorrectKey,
)

# No other key could do better after these.
_FATAL: Final = (CredentialsUnavailable, DeadlineExceeded)

_EMPTY_HINT: Final = (
    "a failed `aws kms encrypt ... | base64 --decode > FILE` leaves an empty file: encrypt it again"
)


@dataclass(frozen=True, slots=True)
class DecryptedInfo:
    """What is known of a plaintext beside its content.

    Attributes:
        size_bytes: its exact length.
        key_arn: the key that KMS used.
        format: a value of `Format`.
        bound_version: the version that its authenticated encryption context names; None for
            files that are not bound.
        call: what KMS was asked, if it told.
    """

    size_bytes: int
    key_arn: str
    format: str
    bound_version: int | None = None
    call: KmsCall | None = None


def decrypt_ciphertext(
    ciphertext: bytes, rules: DecryptRules, keys: Decrypter, allocate: Allocate
) -> DecryptedInfo:
    """Decrypt and verify one file's ciphertext into memory of the caller's choice.

    Args:
        ciphertext: the whole file.
        allocate: called at most once, with the plaintext's exact length. Its buffer is the only
            place that plaintext is written to on purpose; what AWS libraries leave on the heap
            ends with the process. If anything fails after the call, the buffer is zeroed.

    Raises:
        FormatUnknown, CiphertextInvalid, AlgorithmNotAllowed: the file is at fault.
        ContextMismatch, NotBound: it does not belong where it lies.
        FileTooLarge: more plaintext than the rules allow.
        KeyNotAllowed: encrypted under no key of the rules; KMS was not asked.
        KmsfsError: as `Decrypter.decrypt` and `allocate` raise.
    """
    if not ciphertext:
        raise CiphertextInvalid("the file is empty", hint=_EMPTY_HINT)
    found = detect(ciphertext)
    match found:
        case Format.ESDK:
            return _decrypt_message(ciphertext, rules, keys, allocate)
        case Format.KMS_BLOB:
            blob = ciphertext
        case Format.KMS_BLOB_BASE64:
            blob = kms_blob.decode_base64(ciphertext)
        case Format.UNKNOWN:
            if not rules.unknown_as_blob:
                raise FormatUnknown("the file is of no known format")
            blob = kms_blob.guess_blob(ciphertext)
            if len(blob) > kms_blob.MAX_CIPHERTEXT_BYTES:
                raise FormatUnknown(
                    f"the file is of no known format, and too long ({len(blob)} bytes) for a KMS "
                    "ciphertext blob"
                )
    return _decrypt_blob(blob, found, rules, keys, allocate)


# --- bare blobs --------------------------------------------------------------------------------


def _decrypt_blob(
    blob: bytes, found: Format, rules: DecryptRules, keys: Decrypter, allocate: Allocate
) -> DecryptedInfo:
    if len(blob) > kms_blob.MAX_CIPHERTEXT_BYTES:
        raise CiphertextInvalid(
            f"{len(blob)} bytes are too many for a KMS ciphertext blob "
            f"({kms_blob.MAX_CIPHERTEXT_BYTES} at most)"
        )
    if rules.binding_required:
        raise NotBound("a bare KMS ciphertext blob is bound to no place")
    decryption = None
    refused: IncorrectKey | None = None
    for key_id in _blob_key_ids(rules):
        try:
            decryption = keys.decrypt(
                blob, key_id=key_id, encryption_context=rules.encryption_context
            )
            break
        except IncorrectKey as error:
            refused = error
    if decryption is None:
        failed = IncorrectKey(f"none of the allowed keys encrypted it: {', '.join(rules.key_ids)}")
        failed.call = None if refused is None else refused.call
        raise failed
    size_bytes = len(decryption.plaintext)
    if size_bytes > rules.max_plaintext_bytes:
        raise FileTooLarge(f"{size_bytes} bytes, {rules.max_plaintext_bytes} at most")
    allocate(size_bytes)[:] = decryption.plaintext
    return DecryptedInfo(size_bytes, decryption.key_arn, found, call=decryption.call)


def _blob_key_ids(rules: DecryptRules) -> Sequence[str | None]:
    if rules.any_key:
        return (None,)
    if not rules.key_ids:
        raise KeyNotAllowed(
            "a bare KMS ciphertext blob does not name its key, and no key is allowed here",
            hint="name its key with --key-id or under key_ids, or take any with --any-key",
        )
    return rules.key_ids


# --- Encryption SDK messages -------------------------------------------------------------------


def _decrypt_message(
    ciphertext: bytes, rules: DecryptRules, keys: Decrypter, allocate: Allocate
) -> DecryptedInfo:
    view = memoryview(ciphertext)

    def read_at(offset: int, size_bytes: int) -> bytes:
        return bytes(view[offset : offset + size_bytes])

    header = esdk_header.read_header(read_at, len(ciphertext))
    if not header.suite.committing and not rules.allow_non_committing:
        raise AlgorithmNotAllowed(f"suite {header.suite.name} does not commit to its key")
    check_place(header.encryption_context, rules.place, required=rules.binding_required)
    check_pairs(header.encryption_context, rules.encryption_context)
    size_bytes = esdk_header.plaintext_size_bytes(header, len(ciphertext), read_at)
    if size_bytes > rules.max_plaintext_bytes:
        raise FileTooLarge(f"{size_bytes} bytes, {rules.max_plaintext_bytes} at most")
    data_key, key_arn, call = _unwrap(header, rules, keys)
    out = allocate(size_bytes)
    try:
        esdk.decrypt_message(ciphertext, header, data_key, out)
    except BaseException as error:
        out[:] = bytes(len(out))
        if isinstance(error, KmsfsError):
            error.call = call
        raise
    return DecryptedInfo(
        size_bytes, key_arn, Format.ESDK, bound_version(header.encryption_context), call
    )


def _unwrap(
    header: EsdkHeader, rules: DecryptRules, keys: Decrypter
) -> tuple[bytes, str, KmsCall | None]:
    """The message's data key, from the first allowed key that gives it; that key's ARN; and what
    KMS was asked."""
    failures: list[KmsfsError] = []
    for wrapped, key_arn, key_id in _attempts(header, rules):
        try:
            unwrapped = _unwrap_one(header, wrapped, key_arn, key_id, keys)
            return unwrapped.plaintext, key_arn, unwrapped.call
        except _FATAL:
            raise
        except KmsfsError as error:
            failures.append(error)
    if failures:
        raise min(failures, key=_rank)
    if not header.key_arns:
        providers = sorted({key.provider_id for key in header.encrypted_data_keys})
        raise KeyNotAllowed(
            "its header names no KMS key by ARN; its data key was wrapped by "
            + ", ".join(map(repr, providers)),
            hint="kmsfs reads Encryption SDK messages whose data key KMS has wrapped",
        )
    raise KeyNotAllowed(f"encrypted under {', '.join(header.key_arns)}")


def _attempts(
    header: EsdkHeader, rules: DecryptRules
) -> Iterator[tuple[EncryptedDataKey, str, str]]:
    """Wrapped data key, the ARN it names, and the key id to send to KMS, in order of trying."""
    for wrapped in header.encrypted_data_keys:
        key_arn = wrapped.key_arn
        if key_arn is None or not 0 < len(wrapped.ciphertext) <= kms_blob.MAX_CIPHERTEXT_BYTES:
            continue
        if rules.any_key and not rules.key_ids:
            # The explicit wish for whichever key the file names, with nothing to hold it against.
            yield wrapped, key_arn, key_arn
        for key_id in rules.key_ids:
            if _may_name(key_id, key_arn):
                yield wrapped, key_arn, key_id


def _may_name(key_id: str, key_arn: str) -> bool:
    """Whether an allowed key may be the one at `key_arn`; of an alias only KMS knows."""
    if key_id == key_arn:
        return True
    place, _, resource = key_arn.partition(":key/")
    if key_id.startswith("arn:"):
        return ":alias/" in key_id and key_id.partition(":alias/")[0] == place
    return key_id.startswith("alias/") or key_id == resource


def _unwrap_one(
    header: EsdkHeader, wrapped: EncryptedDataKey, key_arn: str, key_id: str, keys: Decrypter
) -> Decryption:
    decryption = keys.decrypt(
        wrapped.ciphertext, key_id=key_id, encryption_context=header.encryption_context
    )
    if decryption.key_arn != key_arn:
        if key_id == key_arn:
            raise KmsAnswerInvalid(f"KMS answered with {decryption.key_arn} for {key_arn}")
        raise CiphertextInvalid(f"names {key_arn}, but is wrapped under {decryption.key_arn}")
    if len(decryption.plaintext) != header.suite.key_bytes:
        raise CiphertextInvalid(
            f"a data key of {len(decryption.plaintext)} bytes for suite {header.suite.name}"
        )
    return decryption


def _rank(error: KmsfsError) -> int:
    return next(
        (rank for rank, kind in enumerate(_MOST_TELLING) if isinstance(error, kind)),
        len(_MOST_TELLING),
    )
