"""Names and paths in a source: relative to its root, which is the empty string."""

import contextlib
from collections.abc import Iterator


def join(directory: str, name: str) -> str:
    """A path relative to the source; the root is the empty string."""
    return f"{directory}/{name}" if directory else name


def ancestors(path: str) -> Iterator[str]:
    """A path, then each directory above it, the root last."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def is_at_or_below(path: str, place: str) -> bool:
    """Whether a path is `place` or lies in it; everything lies in the root."""
    return not place or path == place or path.startswith(place + "/")


def is_hidden(directory: str, name: str) -> bool:
    """Whether a name is one of those that Kubernetes' atomic writer keeps what it swaps under.

    Such sources are served by the links that lead there. The ramfs view has the same layout.
    """
    return not directory and name.startswith("..")


def is_utf8(name: str) -> bool:
    """Whether a name is text; others cannot be served."""
    with contextlib.suppress(UnicodeEncodeError):
        name.encode()
        return True
    return False
