"""Plaintexts that say, throughout, of which file and of which version they are.

The process that writes and those that read make the same bytes from the same two numbers.
"""

import re
from typing import Final

from tests.support.canary import secret

MARK: Final = re.compile(rb"(\d{3})\.(\d{6})")
"""Index and version, as they stand in every line of a plaintext."""

LINE_BYTES: Final = secret("000.000000", 100).index(b"\n") + 1
"""Of a line, which carries one mark: any piece of twice as much has a whole one in it."""

TINY_BYTES: Final = 10
"""A base size up to this stands for a file that is little more than its mark."""

# Plaintexts kept, which are at most about 100 KiB each.
_MAX_KEPT: Final = 300


def size_of(base_bytes: int, version: int) -> int:
    """How long a version is, in bytes: up to an eighth above `base_bytes`, which every third
    has exactly."""
    if base_bytes <= TINY_BYTES:
        return TINY_BYTES + version % 3
    return base_bytes + (version * 7919 % (base_bytes // 8 + 1) if version % 3 else 0)


def content_of(index: int, version: int, base_bytes: int) -> bytes:
    """The plaintext of one version of one file."""
    label = f"{index:03d}.{version:06d}"
    size_bytes = size_of(base_bytes, version)
    if base_bytes <= TINY_BYTES:
        return label.encode().ljust(size_bytes, b"!")
    return secret(label, size_bytes)


class Contents:
    """The plaintexts of all files; those made last are kept.

    Args:
        base_sizes: of each file, by its index.
    """

    def __init__(self, base_sizes: list[int]) -> None:
        self._base_sizes = base_sizes
        self._kept: dict[tuple[int, int], bytes] = {}

    def of(self, index: int, version: int) -> bytes:
        """The plaintext of one version of one file."""
        found = self._kept.get((index, version))
        if found is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            found = content_of(index, version, self._base_sizes[index])
            self._kept[index, version] = found
        return found
