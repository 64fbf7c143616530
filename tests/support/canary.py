"""The canary: a mark in every test's plaintext, and a watch on every place it must not reach.

`secret` makes plaintexts that carry the mark. The plugin below then fails any test where the
mark shows, raw, in hex or in base64, on standard output or error, in a log record, in the text
of an error of kmsfs, or in a file under the test's `tmp_path` where plaintext has no business.
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


def _encodings() -> tuple[bytes, ...]:
    raw = MARK.encode()
    found = [raw, raw.hex().encode(), raw.hex().upper().encode()]
    for shift in range(3):
        # The characters at both ends also depend on what lies around.
        text = base64.b64encode(bytes(shift) + raw + bytes(2))
        first = 0 if shift == 0 else shift + 1
        whole_groups = (shift + len(raw)) * 8 // 6
        found += [text[first:whole_groups], text[first:whole_groups].translate(_URL_SAFE)]
    return tuple(dict.fromkeys(found))


_URL_SAFE = bytes.maketrans(b"+/", b"-_")

ENCODINGS = _encodings()
"""The mark raw, in hex, and in base64 at each of the three alignments."""


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
