"""A volume over a source and a decryptor of the test's own; all between them is the real thing."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, cast

from kmsfs.decryptor.client import DecryptorClient, Plaintext
from kmsfs.events import EventSink
from kmsfs.formats.detect import Format
from kmsfs.memory.arena import Arena
from kmsfs.settings import CacheSettings, MountConfig, Ownership
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.names import join
from kmsfs.store.source import Source, SourceFile, Survey
from kmsfs.store.volume import Volume


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """What lies at a path.

    Attributes:
        number: the version it is bound to, if it is bound.
        copy: of the same number, each one encrypted anew.
    """

    path: str
    number: int = 1
    copy: int = 0

    @property
    def version(self) -> FileVersion:
        """Of its file: no two ciphertexts have the same."""
        return (int.from_bytes(self.path.encode()), 1, 1, self.number, self.copy)


Decryptor = Callable[[Ciphertext, float], Awaitable[Plaintext]]
"""The part of workers and KMS: decrypts by a deadline, or raises KmsfsError."""


@dataclass(slots=True)
class ScriptedSource:
    """What a `Volume` needs of a `Source`: local, and all in memory.

    Attributes:
        files: what lies where, to be changed by the test.
        looked_up: told what an open finds at its path, just before it asks the cache.
        size_of: the size of a plaintext where the outside tells it, else None.
        problems: by path, what is seen to be the matter with a file from outside.
        surveys: how often all of it was walked.
        root: a directory that exists, where something watches it.
    """

    files: dict[str, Ciphertext]
    looked_up: Callable[[Ciphertext], None]
    size_of: Callable[[Ciphertext], int | None]
    problems: dict[str, str] = field(default_factory=dict)
    surveys: int = 0
    root: str = "/"
    is_local: Final = True

    def lookup(self, directory: str, name: str) -> SourceFile | None:
        """See `Source.lookup`."""
        found = self.files.get(join(directory, name))
        if found is None:
            return None
        self.looked_up(found)
        return self._file(found)

    def survey(self) -> Survey:
        """See `Source.survey`."""
        self.surveys += 1
        files = tuple(self._file(self.files[path]) for path in sorted(self.files))
        return Survey(files=files, directories=(), unreadable=(), ignored=())

    def _file(self, found: Ciphertext) -> SourceFile:
        size_bytes = self.size_of(found)
        return SourceFile(
            path=found.path,
            source_path=found.path,
            version=found.version,
            format=Format.ESDK,
            size_bytes=size_bytes or 0,
            size_exact=size_bytes is not None,
            key="key",
            bound=True,
            suffix_taken=False,
            problem=self.problems.get(found.path, ""),
        )

    def open_ciphertext(self, source_path: str) -> tuple[int, FileVersion]:
        """See `Source.open_ciphertext`; there is nothing in the file."""
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), self.files[source_path].version

    def remember_size(self, source_path: str, version: FileVersion, size_bytes: int) -> None:
        """See `Source.remember_size`."""


class _ScriptedClient:
    def __init__(self, source: ScriptedSource, decryptor: Decryptor) -> None:
        self._source = source
        self._decryptor = decryptor

    async def decrypt(
        self, fd: int, rules: object, version: FileVersion, *, key: str, deadline: float
    ) -> Plaintext:
        """See `DecryptorClient.decrypt`."""
        del rules, key
        os.fstat(fd)
        (ciphertext,) = (c for c in self._source.files.values() if c.version == version)
        return await self._decryptor(ciphertext, deadline)


def scripted_volume(
    source: ScriptedSource,
    decryptor: Decryptor,
    *,
    arena: Arena,
    events: EventSink,
    cache: CacheSettings | None = None,
    config: MountConfig | None = None,
) -> Volume:
    """A volume whose cache is the caller's to run, and to lock by itself.

    Args:
        config: the whole of it, else `cache` is enough.
    """
    config = config or MountConfig(
        source="/s",
        mountpoint="/m",
        volume_root="/s",
        ownership=Ownership(uid=0, gid=0),
        cache=cache or CacheSettings(),
    )
    client = _ScriptedClient(source, decryptor)
    return Volume(config, cast(Source, source), arena, cast(DecryptorClient, client), events)
