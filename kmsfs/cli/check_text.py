"""How `check` shows what it found."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from kmsfs.cli.messages import printable
from kmsfs.manage.check import Checked, FileCheck, KeyCheck, Problem
from kmsfs.manage.check_content import ContentCheck

_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S

Contents = Sequence[ContentCheck] | None
"""None where content was not looked at."""


def problems(found: Checked, contents: Contents) -> list[tuple[str, Problem]]:
    """Everything that is wrong, with the key or file it is about."""
    keys = [(key.key_id, key.problem) for key in found.keys]
    files = [(file.path or file.source_path, file.problem) for file in found.files]
    looked_at = [(content.path, content.problem) for content in contents or ()]
    return [
        (about, problem) for about, problem in (*keys, *files, *looked_at) if problem is not None
    ]


def as_json_text(found: Checked, contents: Contents) -> str:
    """One object; `good` tells whether nothing is wrong."""
    shown: dict[str, Any] = {"good": not problems(found, contents)}
    shown |= msgspec.to_builtins(found)
    shown["ignored"] = [{"path": path, "reason": reason} for path, reason in found.ignored]
    shown["content"] = None if contents is None else msgspec.to_builtins(list(contents))
    return msgspec.json.format(msgspec.json.encode(_in_utf8(shown)), indent=2).decode()


def as_text(found: Checked, contents: Contents) -> str:
    """A line for each key and file, and one that counts them."""
    lines = [_key_line(key, decrypted=found.decrypted) for key in found.keys]
    lines += [_file_line(file, decrypted=found.decrypted) for file in found.files]
    lines += [_content_line(content) for content in contents or ()]
    failed = len(problems(found, contents))
    what = f"{_count(len(found.files), 'file')}, {_count(len(found.keys), 'key')}"
    lines.append(f"{what}: {_count(failed, 'failure') if failed else 'all good'}")
    return "\n".join(map(printable, lines))


def _key_line(key: KeyCheck, *, decrypted: bool) -> str:
    does = "decrypts" if decrypted and key.files else "would decrypt"
    return f"key {key.key_id}: {key.problem.error if key.problem is not None else does}"


def _file_line(file: FileCheck, *, decrypted: bool) -> str:
    name = file.path or file.source_path
    if file.problem is not None:
        return f"{name}: {file.problem.error}"
    about = "" if file.size_exact else "about "
    return ", ".join(
        (
            f"{name}: {'decrypted' if decrypted else 'good'}",
            f"{file.format}, {file.binding}",
            f"{about}{_count(file.size_bytes, 'byte')}",
            f"{_age(file.age_s)} old",
        )
    )


def _content_line(content: ContentCheck) -> str:
    if content.problem is not None:
        return f"content of {content.path}: {content.problem.error}"
    return f"content of {content.path}: {', '.join(_holds(content))}"


def _holds(content: ContentCheck) -> Iterator[str]:
    if content.private_keys:
        yield _count(content.private_keys, "private key")
    if content.expires_at is not None:
        yield f"{_count(content.certificates, 'certificate')} until {content.expires_at:%Y-%m-%d}"


def _age(age_s: float) -> str:
    if age_s < 2 * _DAY_S:
        return f"{age_s / _HOUR_S:.0f} h"
    return f"{age_s / _DAY_S:.0f} days"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _in_utf8(value: Any) -> Any:
    """A name that is not UTF-8 has no place in JSON as it is."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {name: _in_utf8(item) for name, item in value.items()}
        case list() | tuple():
            return [_in_utf8(item) for item in value]
    return value
