"""Checking a directory of ciphertext as a mount would take it: its files and its keys."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kmsfs.config import VolumeFile, cache_settings
from kmsfs.decryptor.decrypt import decrypt_ciphertext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    CiphertextInvalid,
    FileTooLarge,
    FormatUnknown,
    InputUnreadable,
    KmsfsError,
    NameConflict,
    SourceMissing,
    SourceUnreadable,
    UsageInvalid,
)
from kmsfs.formats.binding import VERSION_KEY, VOLUME_KEY, Place
from kmsfs.formats.detect import SUFFIXES, Format
from kmsfs.formats.esdk_header import HeaderIncomplete, parse_header
from kmsfs.manage.key_trial import KeyTrial, WouldDecryptError
from kmsfs.manage.keys import KeyOptions, decrypt_probe, settings_for
from kmsfs.manage.place import VolumeHere, volume_above
from kmsfs.settings import KmsSettings
from kmsfs.store.source import Source, SourceFile, Survey

_DAY_S: Final = 86400.0

# Earlier than KMS is old: such a version is a number that somebody gave, not a time.
_FIRST_TIME_S: Final = 1_400_000_000


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong: the error's name (or, for what is no error to a mount, one of its own), what
    happened, what to do."""

    error: str
    detail: str
    hint: str

    @classmethod
    def of(cls, error: KmsfsError) -> "Problem":
        """An error as a record."""
        return cls(error.code, error.detail, error.hint)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file.

    Attributes:
        path: served path, relative to the directory; empty if it is not served.
        binding: `bound`, `unbound`.
        size_bytes: of the plaintext, an estimate unless `size_exact`.
        age_s: since it was encrypted, where kmsfs did that, else since it was last changed.
        keys: ARNs that it names.
    """

    path: str
    source_path: str
    format: str
    binding: str
    size_bytes: int
    size_exact: bool
    age_s: float
    keys: tuple[str, ...]
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class KeyCheck:
    """One key that is allowed; `files` is how many it decrypts, or would."""

    key_id: str
    files: int
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found.

    Attributes:
        decrypted: whether files were decrypted, and not only asked about.
        ignored: source paths that are not served, and why.
    """

    source: str
    volume: str | None
    decrypted: bool
    keys: tuple[KeyCheck, ...]
    files: tuple[FileCheck, ...]
    ignored: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Here:
    """What holds for every file of the directory."""

    root: Path
    volume: VolumeHere | None
    kms: KmsSettings
    max_file_bytes: int
    max_age_s: float | None
    now: float

    def rules(self, file: SourceFile) -> DecryptRules:
        """Those of a mount of this directory."""
        name, path, may_be_unbound = None, file.path, True
        if self.volume is not None:
            name = self.volume.name
            path = os.path.relpath(self.root / file.path, self.volume.root)
            may_be_unbound = self.volume.may_be_unbound(path)
        return DecryptRules.of(
            self.kms,
            Place(name, path),
            binding_required=not may_be_unbound,
            unknown_as_blob=file.suffix_taken,
            max_plaintext_bytes=self.max_file_bytes,
        )


def check_directory(
    directory: Path,
    options: KeyOptions,
    *,
    decrypt: bool,
    max_age_s: float | None = None,
) -> Checked:
    """Check every file of a directory, and every key that may decrypt it.

    Plaintext is wiped as soon as it is verified; copies that AWS libraries leave on the heap end
    with the process.

    Args:
        decrypt: decrypt every file; else KMS is asked whether it would, once for each key.
        max_age_s: a file that was encrypted longer ago is a failure.

    Raises:
        InputUnreadable: no such directory.
        UsageInvalid: no key is allowed to decrypt anything.
        ConfigInvalid, ConfigUntrusted: the volume's configuration.
    """
    if not directory.is_dir():
        raise InputUnreadable(f"{directory} is not a directory")
    # A mount resolves links in its source's path too.
    directory = Path(os.path.realpath(directory))
    volume = volume_above(directory)
    kms = settings_for(volume, options)
    if not kms.key_ids and not kms.any_key:
        raise UsageInvalid(
            "no key is allowed to decrypt anything",
            hint="name the keys with --key-id, or make the directory a volume: `kmsfs init`",
        )
    file = volume.file if volume is not None else VolumeFile()
    here = _Here(
        root=directory,
        volume=volume,
        kms=kms,
        max_file_bytes=cache_settings(file.cache).max_file_bytes,
        max_age_s=max_age_s,
        now=time.time(),
    )
    source = Source(str(directory))
    try:
        return _check(source, here, KeyTrial(decrypt_probe(kms), for_real=decrypt))
    finally:
        source.close()


def _check(source: Source, here: _Here, trial: KeyTrial) -> Checked:
    survey = source.survey()
    files = [_check_file(source, file, here, trial) for file in survey.files]
    ignored = []
    for path, reason in survey.ignored:
        error = _why_not_served(source, survey, path, reason)
        if error is not None:
            files.append(_not_served(path, error))
        else:
            ignored.append((path, reason))
    context = _context_of_any_file(here)
    keys = []
    for key_id in here.kms.key_ids:
        refused = trial.verdict(key_id, context)
        problem = None if refused is None else Problem.of(refused)
        keys.append(KeyCheck(key_id, trial.files[key_id], problem))
    return Checked(
        source=str(here.root),
        volume=None if here.volume is None else here.volume.name,
        decrypted=trial.for_real,
        keys=tuple(keys),
        files=tuple(files),
        ignored=tuple(ignored),
    )


def _context_of_any_file(here: _Here) -> Mapping[str, str]:
    """What a file would be encrypted with if there were one."""
    own = {VOLUME_KEY: here.volume.name} if here.volume is not None else {}
    return {**here.kms.encryption_context, **own}


def _check_file(source: Source, file: SourceFile, here: _Here, trial: KeyTrial) -> FileCheck:
    keys: tuple[str, ...] = ()
    encrypted_at = file.version[3] / 1e9
    problem = None
    try:
        ciphertext = _read(source, file, here.max_file_bytes)
        if file.format is Format.ESDK:
            header = parse_header(ciphertext)
            keys = tuple(header.key_arns)
            encrypted_at = _time_of_version(header.encryption_context, here.now) or encrypted_at
        if file.rivals:
            raise NameConflict(f"{', '.join(file.rivals)} would be served under the same name")
        _try_to_decrypt(ciphertext, here.rules(file), trial, file)
    except HeaderIncomplete:
        problem = Problem.of(CiphertextInvalid("the message ends within its header"))
    except KmsfsError as error:
        problem = Problem.of(error)
    age_s = max(0.0, here.now - encrypted_at)
    if problem is None and here.max_age_s is not None and age_s > here.max_age_s:
        detail = f"it was encrypted {age_s / _DAY_S:.0f} days ago"
        problem = Problem("TooOld", detail, "encrypt it again")
    return FileCheck(
        path=file.path,
        source_path=file.source_path,
        format=file.format,
        binding="bound" if file.bound else "unbound",
        size_bytes=file.size_bytes,
        size_exact=file.size_exact,
        age_s=age_s,
        keys=keys,
        problem=problem,
    )


def _try_to_decrypt(
    ciphertext: bytes, rules: DecryptRules, trial: KeyTrial, file: SourceFile
) -> None:
    bare = file.format is not Format.ESDK
    # Nothing but KMS tells which of several keys encrypted a bare blob, or whether bytes of no
    # known format are one.
    trial.every_file = file.format is Format.UNKNOWN or (bare and len(rules.key_ids) != 1)
    buffer = bytearray()

    def allocate(size_bytes: int) -> memoryview:
        nonlocal buffer
        buffer = bytearray(size_bytes)
        return memoryview(buffer)

    try:
        decrypt_ciphertext(ciphertext, rules, trial, allocate)
    except WouldDecryptError:
        return
    finally:
        buffer[:] = bytes(len(buffer))


def _read(source: Source, file: SourceFile, max_file_bytes: int) -> bytes:
    """A file's ciphertext, whole.

    Raises:
        FileTooLarge: its plaintext must be larger than is served.
    """
    # With frames of 128 bytes, the least that the Encryption SDK writes, a ciphertext is a
    # quarter longer than its plaintext, and header and footer come on top.
    most = max_file_bytes // 4 * 5 + (1 << 20)
    fd, version = source.open_ciphertext(file.source_path)
    try:
        if version[2] > most:
            raise FileTooLarge(f"{version[2]} bytes of ciphertext, {max_file_bytes} are served")
        with open(fd, "rb", closefd=False) as content:
            return content.read(most + 1)
    except OSError as error:
        raise SourceUnreadable(f"{file.source_path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _time_of_version(context: Mapping[str, str], now: float) -> float | None:
    """When kmsfs encrypted a file, from the version it gave it; None if that is no time."""
    text = context.get(VERSION_KEY, "")
    if not (text.isascii() and text.isdigit()):
        return None
    return float(text) if _FIRST_TIME_S <= int(text) <= now + _DAY_S else None


def _why_not_served(source: Source, survey: Survey, path: str, reason: str) -> KmsfsError | None:
    """What is wrong with something that a mount ignores; None if that is as it should be."""
    reason = reason.removeprefix(f"{path}: ")
    if path in survey.unreadable:
        return SourceUnreadable(reason)
    # Whoever called it ciphertext wants it served.
    wanted = path.endswith(SUFFIXES)
    try:
        os.close(source.open_ciphertext(path)[0])
    except SourceUnreadable:
        return SourceUnreadable(reason)
    except SourceMissing:
        return SourceMissing(reason) if wanted else None
    return FormatUnknown(f"it is not served: {reason}") if wanted else None


def _not_served(source_path: str, error: KmsfsError) -> FileCheck:
    return FileCheck(
        path="",
        source_path=source_path,
        format=Format.UNKNOWN,
        binding="unbound",
        size_bytes=0,
        size_exact=False,
        age_s=0.0,
        keys=(),
        problem=Problem.of(error),
    )
