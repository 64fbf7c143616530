"""The audit log's lines, and the frames in which the daemon hands them to the launcher.

The daemon may not write files, so the launcher appends the lines to one. A frame is a number of 8
bytes and one line of JSON; the answer to it is that number and the errno of writing it in 4
bytes, 0 for success. A line has `time` (UTC), `event` (the name of a record of `kmsfs.events`)
and that record's fields. Light to import.
"""

import datetime
import struct
from dataclasses import fields
from typing import Final

import msgspec

from kmsfs.events import Event

MAX_FRAME_BYTES: Final = 64 << 10

# Of a path or an error's detail. Two of them fit a frame, escaped to six times their length.
_MAX_TEXT: Final = 4096

ANSWER: Final = struct.Struct("!QI")
_NUMBER: Final = struct.Struct("!Q")

_encoder: Final = msgspec.json.Encoder()


def line_of(event: Event) -> bytes:
    """An event of now as a line, without its end."""
    record: dict[str, object] = {"time": _now(), "event": type(event).__name__}
    record |= {field.name: _fit(getattr(event, field.name)) for field in fields(event)}
    return _encoder.encode(record)


def line_of_loss(count: int) -> bytes:
    """A line that stands for others which could not be written."""
    return _encoder.encode({"time": _now(), "event": "RecordsLost", "count": count})


def frame_of(number: int, line: bytes) -> bytes:
    """What goes to the launcher."""
    return _NUMBER.pack(number) + line


def take_apart(frame: bytes) -> tuple[int, bytes]:
    """Number and line of a frame.

    Raises:
        ValueError: it is none.
    """
    if len(frame) <= _NUMBER.size:
        raise ValueError(f"a frame of {len(frame)} bytes")
    return _NUMBER.unpack_from(frame)[0], frame[_NUMBER.size :]


def _fit(value: object) -> object:
    """A value as a line can have it: text in UTF-8, and not more than a frame has room for."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"


def _now() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
