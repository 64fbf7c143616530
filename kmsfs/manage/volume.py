"""Making a directory a volume: its kmsfs.toml, and what lies there already."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tomli_w
from wcmatch import glob

from kmsfs.config import VOLUME_FILE_NAME, VOLUME_NAME
from kmsfs.errors import CiphertextInvalid, InputUnreadable, UsageInvalid
from kmsfs.formats import kms_blob
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import DETECT_PREFIX_BYTES, Format, detect, served_name
from kmsfs.formats.esdk_header import read_header
from kmsfs.keys.service import KeyService
from kmsfs.manage.input import check_utf8
from kmsfs.manage.output import check_output, write_file

_VOLUME_FILE_MODE: Final = 0o644

_HEAD: Final = """\
# A volume of kmsfs: this directory's ciphertext is served under the rules below.
# What is set in /etc/kmsfs/{name}.toml replaces what is set here.

"""

_UNBOUND_COMMENT: Final = """\
# unbound: served paths (patterns: *, ?, ** over directories) of files that are not bound to
# their place and are served all the same. All others must be bound, as `kmsfs encrypt` does.
"""

_KMS_COMMENT: Final = """\
# key_ids: the only keys that are ever asked; tried in this order for bare KMS blobs.
"""


@dataclass(frozen=True, slots=True)
class InitializedVolume:
    """What `init_volume` wrote.

    Attributes:
        found_unbound: served paths of unbound ciphertext that lay there, now listed.
        unlistable: source paths of such files whose names are not UTF-8.
    """

    path: Path
    name: str
    key_arns: tuple[str, ...]
    found_unbound: tuple[str, ...]
    unlistable: tuple[str, ...]


def init_volume(
    directory: Path,
    *,
    key_ids: Sequence[str],
    name: str | None,
    unbound: Sequence[str],
    endpoint_url: str | None,
    keys: KeyService,
    replace: bool,
) -> InitializedVolume:
    """Write a directory's kmsfs.toml.

    Args:
        key_ids: resolved to ARNs, so that mounting need not ask.
        name: the volume's; None takes the directory's.
        unbound: patterns to list beside the files found.
        endpoint_url: address of KMS to keep in the file; None for AWS's own.
        replace: whether a kmsfs.toml that is there already is replaced.

    Raises:
        UsageInvalid: not a name; a pattern that is not UTF-8.
        InputUnreadable: no such directory.
        OutputExists, OutputUnwritable: see `write_file`.
        KmsfsError: as `KeyService.resolve_key_arn`.
    """
    path = directory / VOLUME_FILE_NAME
    if not directory.is_dir():
        raise InputUnreadable(f"{directory} is not a directory", hint=f"mkdir {directory}")
    name = _name_of(directory) if name is None else name
    if not VOLUME_NAME.fullmatch(name):
        raise UsageInvalid(
            f"{name!r} is not a volume's name",
            hint="letters, digits, dot, dash and underscore, 64 at most",
        )
    for pattern in unbound:
        check_utf8(pattern, "pattern")
    check_output(path, replace=replace)
    key_arns = tuple(dict.fromkeys(keys.resolve_key_arn(key_id) for key_id in key_ids))
    found: list[str] = []
    unlistable: list[str] = []
    for served in sorted(set(unbound_files(directory))):
        (found if _is_text(served) else unlistable).append(served)
    text = _volume_file(
        name, key_arns, [*unbound, *(glob.escape(served) for served in found)], endpoint_url
    )
    write_file(path, text.encode(), replace=replace, mode=_VOLUME_FILE_MODE)
    return InitializedVolume(path, name, key_arns, tuple(found), tuple(unlistable))


def _volume_file(
    name: str, key_arns: Sequence[str], unbound: Sequence[str], endpoint_url: str | None
) -> str:
    kms: dict[str, object] = {"key_ids": list(key_arns)}
    if endpoint_url is not None:
        kms["endpoint_url"] = endpoint_url
    volume = tomli_w.dumps({"volume": {"name": name, "unbound": list(dict.fromkeys(unbound))}})
    head = _HEAD.format(name=name)
    return head + _UNBOUND_COMMENT + volume + "\n" + _KMS_COMMENT + tomli_w.dumps({"kms": kms})


def _name_of(directory: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.name).strip("._-")[:64]
    return name or "volume"


def unbound_files(directory: Path) -> Iterator[str]:
    """Served paths, relative to `directory`, of ciphertext that is bound to no place."""

    def refuse(error: OSError) -> None:
        raise InputUnreadable(f"{error.filename}: {error.strerror}") from error

    for parent, _, names in os.walk(directory, onerror=refuse):
        for name in names:
            path = os.path.join(parent, name)
            served, suffix_taken = served_name(name)
            if _is_unbound_ciphertext(path, suffix_taken=suffix_taken):
                yield os.path.relpath(os.path.join(parent, served), directory)


def _is_unbound_ciphertext(path: str, *, suffix_taken: bool) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if os.path.islink(path):
            return False
        raise InputUnreadable(f"{path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return False
        match detect(os.pread(fd, DETECT_PREFIX_BYTES, 0)):
            case Format.KMS_BLOB | Format.KMS_BLOB_BASE64:
                return True
            case Format.ESDK:
                header = read_header(lambda at, size: os.pread(fd, size, at), info.st_size)
                return not is_bound(header.encryption_context)
            case Format.UNKNOWN:
                return suffix_taken and 0 < info.st_size <= kms_blob.MAX_CIPHERTEXT_BYTES
    except CiphertextInvalid:
        return False
    finally:
        os.close(fd)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
