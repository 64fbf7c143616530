"""How `inspect` shows what it found."""

import dataclasses
from typing import Final

import msgspec

from kmsfs.cli.messages import printable
from kmsfs.formats.detect import Format
from kmsfs.manage.inspect import Inspection

_FORMAT_NAMES: Final = {
    Format.KMS_BLOB: "KMS ciphertext blob",
    Format.KMS_BLOB_BASE64: "KMS ciphertext blob in base64",
    Format.ESDK: "AWS Encryption SDK message",
    Format.UNKNOWN: "unknown",
}


def as_json_text(found: list[Inspection]) -> str:
    """An array with one object for each file."""
    # A name that is not UTF-8 has no place in JSON as it is.
    objects = [
        dataclasses.replace(
            inspection, path=inspection.path.encode(errors="backslashreplace").decode()
        )
        for inspection in found
    ]
    return msgspec.json.format(msgspec.json.encode(objects)).decode()


def as_text(inspection: Inspection) -> str:
    """A heading and one line for each fact."""
    facts: list[tuple[str, str]] = [("format", _FORMAT_NAMES[inspection.format])]
    for key in inspection.keys:
        facts += [("key", key.arn), ("account", key.account), ("region", key.region)]
    if inspection.suite is not None:
        facts.append(("suite", inspection.suite + _suite_traits(inspection)))
    for name, value in sorted(inspection.encryption_context.items()):
        facts.append(("context", f"{name}={value}"))
    facts.append(("plaintext", _size(inspection)))
    detail = inspection.binding.detail
    facts.append(("binding", inspection.binding.fit + (f": {detail}" if detail else "")))
    if inspection.problem is not None:
        facts.append(("problem", inspection.problem))
    width = max(len(name) for name, _ in facts) + 2
    lines = [f"  {name + ':':<{width}}{printable(value)}" for name, value in facts]
    return "\n".join([printable(inspection.path), *lines])


def _suite_traits(inspection: Inspection) -> str:
    commits = "committing" if inspection.committing else "not committing"
    return f" ({commits}, {'signed' if inspection.signed else 'not signed'})"


def _size(inspection: Inspection) -> str:
    if inspection.plaintext_size_bytes is None:
        return "of unknown size"
    return f"{inspection.plaintext_size_bytes} bytes ({inspection.plaintext_size})"
