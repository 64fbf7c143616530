"""What is wrong with a configuration file, told with line, value and the nearest right word."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

import msgspec

_TABLE: Final = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_-]+)\s*\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(r"""\s*(["']?)([A-Za-z0-9_-]+)\1\s*=""")

# How msgspec words what it finds, and where.
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`")
_MISSING: Final = re.compile(r"Object missing required field `(?P<key>[^`]*)`")
_PLACE: Final = re.compile(r" - at `\$(?P<place>[^`]*)`$")
_STEP: Final = re.compile(r"\.(?P<name>[A-Za-z0-9_-]+)|\[(?P<index>\d+)\]")

# Of a value that is shown.
_MAX_SHOWN: Final = 60

Schema = Mapping[str, Iterable[str]]
"""Names of tables, each with the names of its keys."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong: `text` begins with the line where one is known."""

    text: str
    hint: str | None


def complaint_of(
    error: msgspec.ValidationError, text: str, raw: dict[str, Any], schema: Schema
) -> Complaint:
    """An error of converting a file, in the terms of the file.

    Args:
        text: of the file.
        raw: what was converted.
    """
    said = str(error)
    place = _PLACE.search(said)
    what = said if place is None else said[: place.start()]
    steps = [] if place is None else list(_STEP.finditer(place["place"]))
    names = [step["name"] for step in steps if step["name"]]
    index = next((int(step["index"]) for step in steps[1:2] if step["index"]), 0)
    table = names[0] if names else ""
    under = f" under [{table}]" if table else ""
    if unknown := _UNKNOWN.match(what):
        key = unknown["key"]
        kind = "key" if table else "table"
        at = line_of(text, table, key, index) if table else line_of(text, key)
        return Complaint(f"{_line(at)}unknown {kind} {key!r}{under}", _nearest(key, table, schema))
    if missing := _MISSING.match(what):
        at = line_of(text, table, index=index)
        return Complaint(f"{_line(at)}{missing['key']} is missing{under}", None)
    key = names[1] if len(names) > 1 else ""
    at = line_of(text, table, key, index)
    name = ".".join(names)
    shown = _shown(_value_at(raw, steps))
    return Complaint(f"{_line(at)}{name} = {shown}: {what[:1].lower()}{what[1:]}", None)


def with_line(detail: str, text: str) -> str:
    """A complaint about a key that it names first, as in `cache.ttl_s …`, with its line."""
    found = re.match(r"([a-z_]+)\.([a-z_]+)\b", detail)
    return detail if found is None else _line(line_of(text, found[1], found[2])) + detail


def line_of(text: str, table: str, key: str = "", index: int = 0) -> int | None:
    """The line, from 1, of a table or of a key in it; None if it is not found.

    Args:
        index: which of several tables of an array.
    """
    current, seen = "", -1
    for number, line in enumerate(text.splitlines(), 1):
        if head := _TABLE.match(line):
            current = head[2]
            if current == table:
                seen += 1
                if not key and seen == index:
                    return number
        elif (found := _KEY.match(line)) and current in ("", table):
            if key and current == table and found[2] == key and seen == index:
                return number
            if not key and current == "" and found[2] == table:
                return number
    return None


def _nearest(key: str, table: str, schema: Schema) -> str | None:
    if not table:
        close = get_close_matches(key, schema, n=1)
        return f"did you mean [{close[0]}]?" if close else f"one of {', '.join(schema)}"
    for other, keys in schema.items():
        if key in keys:
            return f"it belongs under [{other}]"
    own = list(schema.get(table, ()))
    if close := get_close_matches(key, own, n=1, cutoff=0.5):
        return f"did you mean {close[0]}?"
    return f"one of {', '.join(own)}" if own else None


def _value_at(raw: Any, steps: Iterable["re.Match[str]"]) -> Any:
    value = raw
    for step in steps:
        value = value[step["name"] if step["name"] else int(step["index"])]
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _line(number: int | None) -> str:
    return "" if number is None else f"line {number}: "
