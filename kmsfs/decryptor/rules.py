"""What a decryption must hold to: decided by the daemon, obeyed by whoever decrypts."""

import msgspec

from kmsfs.formats.binding import Place
from kmsfs.settings import KmsSettings


class DecryptRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rules for one file.

    Attributes:
        key_ids: allowed keys (ARN, alias or id), in the order in which bare blobs try them.
        any_key: for bare blobs, send no KeyId and accept whichever key KMS names. Without any
            key_ids, also decrypt Encryption SDK messages under the key that they name.
        encryption_context: sent with bare blobs; required pairs of Encryption SDK messages.
        place: where the file lies; a binding in the file must fit it.
        binding_required: refuse files that are not bound.
        unknown_as_blob: try bytes of no known format as a bare blob (the name's suffix says
            that they are one).
        max_plaintext_bytes: refuse larger plaintexts, before decrypting where the size is known.
        allow_unlocked: plaintext may come in memory that is not locked.
        allow_non_committing: accept Encryption SDK suites without key commitment.
    """

    key_ids: tuple[str, ...] = ()
    any_key: bool = False
    encryption_context: dict[str, str] = {}
    place: Place
    binding_required: bool = False
    unknown_as_blob: bool = False
    max_plaintext_bytes: int = 16 << 20
    allow_non_committing: bool = False
    allow_unlocked: bool = False

    @classmethod
    def of(
        cls,
        kms: KmsSettings,
        place: Place,
        *,
        binding_required: bool,
        unknown_as_blob: bool,
        max_plaintext_bytes: int,
        allow_unlocked: bool = False,
    ) -> "DecryptRules":
        """The rules for a file at `place` under a mount's key settings."""
        return cls(
            key_ids=kms.key_ids,
            any_key=kms.any_key,
            encryption_context=kms.encryption_context,
            place=place,
            binding_required=binding_required,
            unknown_as_blob=unknown_as_blob,
            max_plaintext_bytes=max_plaintext_bytes,
            allow_non_committing=kms.allow_non_committing,
            allow_unlocked=allow_unlocked,
        )
