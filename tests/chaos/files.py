"""The files of a run: where they lie, under which key, and their ciphertexts.

Ciphertexts are made with the keys themselves, so that outages of KMS do not stop them.
"""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from kmsfs.formats.binding import Place
from kmsfs.keys.service import DataKey, KeyService
from kmsfs.manage.encrypt import encrypt_bound
from tests.chaos.content import TINY_BYTES, content_of
from tests.support.sites import VOLUME
from tests.support.strict_keys import KmsKey

BARE_PATTERN: Final = "legacy/**"
"""What the volume serves though it is not bound."""

_DIRECTORIES: Final = ("", "tls", "tls/web", "db")
_BOUND_SIZES: Final = (TINY_BYTES, 300, 4096, 4096, 20_000, 60_000, 100_000)
_BARE_SIZES: Final = (TINY_BYTES, 200, 1000, 3000)

_OLDER_KEPT: Final = 3


@dataclass(eq=False)
class ChaosFile:
    """One file.

    Attributes:
        name: served path.
        base_bytes: see `content.size_of`.
        bound: whether its ciphertext names its place; else it is a bare blob.
        version: in place now, or to be put back once a tampering is over.
        ciphertext: of that version.
        older: those that were in place before it.
    """

    index: int
    name: str
    base_bytes: int
    bound: bool
    key: KmsKey
    version: int = 0
    ciphertext: bytes = b""
    older: deque[bytes] = field(default_factory=lambda: deque(maxlen=_OLDER_KEPT))

    @property
    def source_name(self) -> str:
        """Its ciphertext's path, relative to the source."""
        return f"{self.name}.{'encrypted' if self.index % 2 else 'kms'}"

    def encrypt(self, version: int) -> bytes:
        """The ciphertext of a version."""
        plaintext = content_of(self.index, version, self.base_bytes)
        if not self.bound:
            return self.key.seal(plaintext, {})
        return encrypt_bound(
            plaintext,
            Place(VOLUME, self.name),
            version,
            key_id=self.key.arn,
            encryption_context={},
            keys=cast(KeyService, _KeyItself(self.key)),
        ).ciphertext


def make_files(bound: int, bare: int, keys: list[KmsKey]) -> list[ChaosFile]:
    """So many files of mixed sizes, in several directories, under all the keys in turn."""
    files = []
    for index in range(bound + bare):
        is_bound = index < bound
        sizes = _BOUND_SIZES if is_bound else _BARE_SIZES
        directory = _DIRECTORIES[index % len(_DIRECTORIES)] if is_bound else "legacy"
        name = f"{directory}/file-{index}".lstrip("/")
        files.append(
            ChaosFile(index, name, sizes[index % len(sizes)], is_bound, keys[index % len(keys)])
        )
    return files


class Ciphertexts:
    """Puts ciphertexts into a source.

    Args:
        staging: a directory beside the source, on the same filesystem.
    """

    def __init__(self, source: Path, staging: Path) -> None:
        self._source = source
        self._staging = staging
        staging.mkdir()

    def path(self, file: ChaosFile) -> Path:
        """Where a file's ciphertext lies."""
        return self._source / file.source_name

    def put(self, file: ChaosFile, ciphertext: bytes) -> None:
        """Put a ciphertext in place in one step."""
        path = self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._staging / "next"
        beside.write_bytes(ciphertext)
        beside.rename(path)

    def remove(self, file: ChaosFile) -> None:
        """Take it away."""
        self.path(file).unlink()

    def write_in_place(self, file: ChaosFile, ciphertext: bytes, *, start: int = 0) -> None:
        """Write over what is there, from an offset on, and end it there."""
        fd = os.open(self.path(file), os.O_WRONLY)
        try:
            os.pwrite(fd, ciphertext[start:], start)
            os.ftruncate(fd, len(ciphertext))
        finally:
            os.close(fd)

    def write_part(self, file: ChaosFile, ciphertext: bytes, *, truncate: bool) -> None:
        """Write over what is there, as a writer does that is interrupted."""
        flags = os.O_WRONLY | (os.O_TRUNC if truncate else 0)
        fd = os.open(self.path(file), flags)
        try:
            os.write(fd, ciphertext)
        finally:
            os.close(fd)


class _KeyItself:
    """The part of a KeyService that encrypting needs, without a service."""

    def __init__(self, key: KmsKey) -> None:
        self._key = key

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """GenerateDataKey."""
        plaintext = os.urandom(size_bytes)
        return DataKey(plaintext, self._key.seal(plaintext, encryption_context), key_id)
