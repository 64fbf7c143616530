"""Rollback: an older version of a file, put back in place of a newer one, is told from a new one.

`kmsfs encrypt` writes a rising version into the encryption context, which is authenticated. What
is remembered here is the highest one that was decrypted, by path, for the life of the mount.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from kmsfs.errors import CiphertextChanging, RolledBack
from kmsfs.store.names import is_at_or_below


class SeenVersions:
    """The highest version of each path that was seen authenticated.

    Args:
        allow_older: refuse nothing.
    """

    def __init__(self, *, allow_older: bool = False) -> None:
        self._allow_older = allow_older
        self._highest: dict[str, int] = {}

    def highest_of(self, path: str) -> int:
        """The highest version seen of a path; 0 where none was."""
        return self._highest.get(path, 0)

    def check(self, path: str, version: int | None, *, begun_at: int) -> None:
        """Take note of a version that was just authenticated.

        Args:
            version: None for a file that is not bound, which has none and always passes.
            begun_at: what `highest_of` said before the ciphertext was read.

        Raises:
            RolledBack: a higher one was seen before; the same one passes.
            CiphertextChanging: a higher one came meanwhile, so that this one was replaced.
        """
        if version is None:
            return
        highest = self._highest.get(path, version)
        if version < highest and not self._allow_older:
            if version >= begun_at:
                raise CiphertextChanging("a newer version came while it was decrypted")
            raise RolledBack(f"version {version}, where version {highest} was seen before")
        self._highest[path] = max(version, highest)

    def known(self) -> dict[str, int]:
        """The highest version of each path that has one."""
        return dict(self._highest)

    def restore(self, known: Mapping[str, int]) -> None:
        """Take over what `known` said in a process before this one."""
        for path, version in known.items():
            self._highest[path] = max(version, self._highest.get(path, version))

    def below(self, place: str) -> list[str]:
        """The paths at or below `place` of which a version was seen."""
        return sorted(path for path in self._highest if is_at_or_below(path, place))

    @contextlib.contextmanager
    def accepting_older(self, paths: Iterable[str]) -> Iterator[None]:
        """Meanwhile, the first version of each of these paths to come is accepted, however old.

        A path of which none comes has the highest version it had before.
        """
        before = {path: self._highest.pop(path) for path in paths if path in self._highest}
        try:
            yield
        finally:
            self._highest = {**before, **self._highest}
