"""Extended attributes of files in the FUSE view: what is remembered of them; never KMS."""

from datetime import UTC, datetime
from typing import Final

from kmsfs.formats.detect import Format
from kmsfs.store.source import SourceFile
from kmsfs.store.volume import Volume

PREFIX: Final = b"user.kmsfs."


def attributes_of(volume: Volume, file: SourceFile) -> dict[bytes, bytes]:
    """All attributes that are known, by name.

    `format` shows from outside. The others are of the last decryption of exactly this
    ciphertext, and absent before it; `version` is absent for files that are not bound.
    """
    known: dict[str, str] = {}
    if file.format is not Format.UNKNOWN:
        known["format"] = file.format
    success = volume.history.success_of(file)
    if success is not None:
        if success.bound_version is not None:
            known["version"] = str(success.bound_version)
        known["format"] = success.format
        known["key_arn"] = success.key_arn
        known["decrypted_at"] = datetime.fromtimestamp(success.at_unix_s, UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )
        known["age_s"] = f"{success.age_s:.3f}"
        known["stale"] = "1" if volume.cache.is_stale(file.path) else "0"
    return {PREFIX + name.encode(): value.encode() for name, value in sorted(known.items())}
