"""Binding: the encryption context that ties a ciphertext to its volume, path and version.

The context is authenticated, by KMS and by the message header. The reader computes where a file
lies; a file that says otherwise was moved, renamed or swapped, and is not served.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kmsfs.errors import ContextMismatch, NotBound

VOLUME_KEY: Final = "kmsfs:volume"
PATH_KEY: Final = "kmsfs:path"
VERSION_KEY: Final = "kmsfs:version"

# What fits a signed 64-bit integer, as messages between processes have them.
_VERSION: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file lies: its volume's name (None without a kmsfs.toml) and its served path.

    `path` is relative to the volume's root, in UTF-8, with `/` between names and without the
    suffix that is taken off for serving.
    """

    volume: str | None
    path: str


def is_bound(context: Mapping[str, str]) -> bool:
    """Whether an encryption context names a volume or a path of kmsfs."""
    return VOLUME_KEY in context or PATH_KEY in context


def bound_version(context: Mapping[str, str]) -> int | None:
    """The version that a bound file's encryption context names; None if it is not bound.

    A bound file without a version, or with one that kmsfs would not write, has version 0: it is
    older than any that kmsfs wrote.
    """
    if not is_bound(context):
        return None
    text = context.get(VERSION_KEY, "")
    return int(text) if _VERSION.fullmatch(text) else 0


def bound_context(place: Place, version: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The encryption context that kmsfs writes for a file at `place`, over `extra` pairs."""
    context = dict(extra)
    if place.volume is not None:
        context[VOLUME_KEY] = place.volume
    context[PATH_KEY] = place.path
    context[VERSION_KEY] = str(version)
    return context


def check_place(context: Mapping[str, str], place: Place, *, required: bool) -> None:
    """Hold a file's encryption context against the place where it lies.

    A context that names volume or path must fit, always; one that names neither passes unless
    binding is `required`.

    Raises:
        ContextMismatch: it names another volume or path.
        NotBound: binding is required and it is not bound to both.
    """
    for key, here, what, lies in (
        (VOLUME_KEY, place.volume, "volume", "in"),
        (PATH_KEY, place.path, "path", "at"),
    ):
        named = context.get(key)
        if named is not None and named != here:
            found = f"{lies} {here!r}" if here is not None else f"{lies} no {what}"
            raise ContextMismatch(f"bound to {what} {named!r}, but lies {found}")
        if named is None and required:
            raise NotBound(f"its encryption context names no {what}")


def check_pairs(context: Mapping[str, str], required: Mapping[str, str]) -> None:
    """Require each configured pair in a file's encryption context.

    Raises:
        ContextMismatch: a pair is missing or has another value.
    """
    for key, value in required.items():
        if context.get(key) != value:
            raise ContextMismatch(f"its encryption context lacks {key}={value}")
