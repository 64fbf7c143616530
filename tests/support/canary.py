"""The canary: a mark in every test's plaintext, and a watch on every place it must not reach.

`secret` makes plaintexts that carry the mark. The plugin below then fails any test where the
mark shows, raw or in any of its `encodings`, on standard output or error, in a log record, in the
text of an error of kmsfs, or in a file under the test's `tmp_path` where plaintext has no
business.
`@pytest.mark.plaintext_on("stdout", ...)` names streams of a test where it belongs: `stdout`,
`stderr`, `log`, `error`, `files`.
"""

import base64
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "kmsfs-canary-7Qx"

# Files that tests write plaintext into have other names.
WATCHED_SUFFIXES = frozenset(
    {".encrypted", ".kms", ".log", ".json", ".toml", ".err", ".sock", ".pid", ".tmp"}
)

_REDACTED = "<canary>"


def secret(label: str, size_bytes: int) -> bytes:
    """A test's plaintext, different for each label, that carries the mark throughout.

    Under 16 bytes the mark does not fit, and nothing watches it.
    """
    unit = f"{MARK}:{label}:"
    parts = []
    length = 0
    while length < size_bytes:
        part = f"{unit}{length:08x}\n".encode()
        parts.append(part)
        length += len(part)
    return b"".join(parts)[:size_bytes]


def encodings(mark: bytes) -> dict[str, bytes]:
    """What a mark of ASCII characters looks like in memory or in text, by the name of the form.

    Raw, in hex, in UTF-16 and UTF-32, and in base64 of both alphabets at each of the three
    alignments, without the characters at both ends that depend on what lies around.
    """
    text = mark.decode("ascii")
    found = {"raw": mark, "hex": mark.hex().encode(), "HEX": mark.hex().upper().encode()}
    for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        found[name] = text.encode(name)
    for shift in range(3):
        whole = base64.b64encode(bytes(shift) + mark + bytes(2))
        first = 0 if shift == 0 else shift + 1
        standard = whole[first : (shift + len(mark)) * 8 // 6]
        found[f"base64 at {shift}"] = standard
        if (url_safe := standard.translate(_URL_SAFE)) != standard:
            found[f"base64url at {shift}"] = url_safe
    return found


_URL_SAFE = bytes.maketrans(b"+/", b"-_")

ENCODINGS = tuple(encodings(MARK.encode()).values())
"""The mark in each form."""


def forms_of(label: str) -> dict[str, bytes]:
    """The forms of what `secret` repeats for this label, and for all that begin with it."""
    return encodings(f"{MARK}:{label}".encode())


def carries(data: bytes | str) -> bool:
    """Whether the mark shows in these bytes, in any of its encodings."""
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")
    # Encoders break their lines.
    joined = data.replace(b"\r", b"").replace(b"\n", b"")
    return any(form in data or form in joined for form in ENCODINGS)


def redact(text: str) -> str:
    """The text without the mark."""
    for form in ENCODINGS:
        text = text.replace(form.decode(), _REDACTED)
    return text if not carries(text) else _REDACTED


def check_streams(streams: Iterable[tuple[str, bytes]], plaintext_on: Iterable[str] = ()) -> None:
    """Fail where the mark shows on a stream.

    Args:
        streams: name and content.
        plaintext_on: names of streams where plaintext belongs.

    Raises:
        AssertionError: names the streams, not what is on them.
    """
    leaks = [name for name, content in streams if name not in plaintext_on and carries(content)]
    assert not leaks, f"plaintext on {', '.join(leaks)}"


def leaking_files(directory: Path) -> Iterator[Path]:
    """Files below a directory where plaintext has no business, and is.

    Watched are names with a suffix of `WATCHED_SUFFIXES` or a dot in front. Other filesystems
    that are mounted below are left alone.
    """
    try:
        device = directory.lstat().st_dev
    except OSError:
        return
    for place, names, files in os.walk(directory):
        names[:] = [name for name in names if _device(Path(place, name)) == device]
        for name in files:
            path = Path(place, name)
            if path.suffix not in WATCHED_SUFFIXES and not name.startswith("."):
                continue
            if path.is_file() and not path.is_symlink() and carries(path.read_bytes()):
                yield path


def _device(path: Path) -> int | None:
    try:
        return path.lstat().st_dev
    except OSError:
        return None
