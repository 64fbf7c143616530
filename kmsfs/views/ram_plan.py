"""Which files the ramfs shows next: decided here, without touching anything.

A refresh has two decisions. Before KMS is asked, `plan` says which files stay as they are and
which are asked for. After it, `settle` makes the next set of what came back. A file that changed
is never mixed with one that could not follow: while KMS fails for any changed file, all that
are shown already keep the version they have, so that a certificate and its key never disagree.
"""

import errno
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kmsfs.decryptor.breaker import is_failure
from kmsfs.errors import CiphertextInvalid, ExitCode, KmsfsError, RamLimitReached, WorkerFailed
from kmsfs.memory.mapping import round_to_pages
from kmsfs.settings import CacheSettings
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.names import is_at_or_below
from kmsfs.store.source import SourceFile, Survey

# A file that fails is asked for again after this, and after twice as long each time.
_FIRST_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 60.0
# While KMS fails, no longer than this: it bounds how late its return is noticed, and most
# files cost no call then (`decryptor.breaker`).
_MAX_AWAY_RETRY_S: Final = 2.0


class RamFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the ramfs shows.

    Attributes:
        version: of the ciphertext that it was decrypted from.
        decrypted_at_s: when KMS was asked for it last, on the clock that runs from boot.
    """

    source_path: str
    version: FileVersion
    size_bytes: int
    decrypted_at_s: float

    def is_of(self, file: SourceFile) -> bool:
        """Whether this is the plaintext of exactly that ciphertext."""
        return (self.source_path, self.version) == (file.source_path, file.version)


def memory_of(files: Mapping[str, RamFile]) -> int:
    """What files take of a ramfs: whole pages, in bytes."""
    return sum(round_to_pages(file.size_bytes) for file in files.values())


Outcome = RamFile | KmsfsError


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with one version of a file, and when it is asked for again."""

    version: FileVersion
    error: KmsfsError
    again_at_s: float
    delay_s: float

    @staticmethod
    def after(
        before: "Trouble | None", file: SourceFile, error: KmsfsError, now: float
    ) -> "Trouble":
        """The next one, given the one before for this path."""
        delay_s = _FIRST_RETRY_S
        if before is not None and before.version == file.version:
            # What was not asked was not refused once more.
            delay_s = before.delay_s * (1 if error.again_in_s is not None else 2)
        # A lost process may be lost to this file again, each time for a call to KMS.
        of_kms = is_failure(error) and not isinstance(error, WorkerFailed)
        delay_s = min(delay_s, _MAX_AWAY_RETRY_S if of_kms else _MAX_RETRY_S)
        # Asking again about the same bytes changes nothing.
        final = error.exit_code is ExitCode.NOT_AUTHENTIC or error.errno == errno.EFBIG
        return Trouble(file.version, error, math.inf if final else now + delay_s, delay_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done before a set can be published.

    Attributes:
        keep: files that stay as they are.
        ask: files to decrypt: new, changed, or due to be asked for again.
        known: what became of the others without asking.
    """

    keep: dict[str, RamFile]
    ask: tuple[SourceFile, ...]
    known: dict[str, KmsfsError]


@dataclass(frozen=True, slots=True)
class NextSet:
    """What the ramfs is to show.

    Attributes:
        fresh: paths whose content was written for this set; all others are linked.
        held_back: paths whose change waits until KMS can be asked for all that changed.
        stale: files shown although KMS could not be asked, with why not.
        failed: files not shown, with why not.
    """

    files: dict[str, RamFile]
    directories: tuple[str, ...]
    fresh: frozenset[str]
    held_back: frozenset[str] = frozenset()
    stale: dict[str, KmsfsError] = field(default_factory=dict)
    failed: dict[str, KmsfsError] = field(default_factory=dict)


def plan(
    survey: Survey,
    shown: Mapping[str, RamFile],
    troubles: Mapping[str, Trouble],
    cache: CacheSettings,
    now: float,
    *,
    again: str | None = None,
) -> Plan:
    """Decide which files are asked for.

    Args:
        shown: what the ramfs shows now.
        now: on the clock that runs from boot.
        again: a path; files at or below it are asked for though they need not be yet.
    """
    keep: dict[str, RamFile] = {}
    wanted: list[SourceFile] = []
    known: dict[str, KmsfsError] = {}
    for file in survey.files:
        old = shown.get(file.path)
        trouble = troubles.get(file.path)
        at_once = again is not None and is_at_or_below(file.path, again)
        if file.problem and not file.rivals:
            known[file.path] = CiphertextInvalid(file.problem)
        elif at_once:
            wanted.append(file)
        elif trouble is not None and trouble.version == file.version and now < trouble.again_at_s:
            known[file.path] = trouble.error
        elif old is not None and old.is_of(file) and now < old.decrypted_at_s + cache.lifetime_s:
            keep[file.path] = old
        else:
            wanted.append(file)
    for path, old in shown.items():
        # Of a directory that cannot be listed nothing new is known.
        if path not in keep and any(_is_in(path, place) for place in survey.unreadable):
            keep[path] = old
    ask: list[SourceFile] = []
    total_bytes = sum(round_to_pages(file.size_bytes) for file in keep.values())
    for file in wanted:
        size_bytes = round_to_pages(file.size_bytes) if file.size_exact else 0
        if total_bytes + size_bytes > cache.max_bytes:
            known[file.path] = limit_reached(total_bytes, file.size_bytes, cache)
            continue
        total_bytes += size_bytes
        ask.append(file)
    return Plan(keep, tuple(ask), known)


def limit_reached(total_bytes: int, size_bytes: int, cache: CacheSettings) -> RamLimitReached:
    """The error of a file that the set has no room for."""
    return RamLimitReached(
        f"its {size_bytes} bytes do not fit: {total_bytes} of {cache.max_bytes} bytes are taken"
    )


def settle(
    survey: Survey,
    decided: Plan,
    outcomes: Mapping[str, Outcome],
    shown: Mapping[str, RamFile],
    waiting: frozenset[str] = frozenset(),
    *,
    cache: CacheSettings,
    now: float,
) -> NextSet:
    """Make the next set.

    Args:
        outcomes: of every file in `decided.ask`.
        waiting: `held_back` of the set before. They count as changed, though they may not be
            shown any more, their old version being past its time.
    """
    by_path = {file.path: file for file in survey.files}
    results: dict[str, Outcome] = {**decided.known, **outcomes}
    changed = {
        path
        for path, result in results.items()
        if path in waiting or (path in shown and _differs(shown[path], result, by_path[path]))
    }
    failure = next(
        (
            result
            for path, result in results.items()
            if path in changed and isinstance(result, KmsfsError) and is_failure(result)
        ),
        None,
    )
    held_back = frozenset(changed) if failure is not None else frozenset()
    files = dict(decided.keep)
    fresh: set[str] = set()
    stale: dict[str, KmsfsError] = {}
    failed: dict[str, KmsfsError] = {}
    for path, result in results.items():
        old = shown.get(path)
        if isinstance(result, RamFile):
            if failure is None or path not in held_back:
                files[path] = result
                if old is None or path in changed:
                    fresh.add(path)
                continue
            error: KmsfsError = failure
        else:
            error = result
        if old is not None and is_failure(error) and now < _last_moment(old, cache):
            files[path] = old
            stale[path] = error
        else:
            failed[path] = error
    return NextSet(
        files=dict(sorted(files.items())),
        directories=survey.directories,
        fresh=frozenset(fresh),
        held_back=held_back,
        stale=stale,
        failed=failed,
    )


def _last_moment(file: RamFile, cache: CacheSettings) -> float:
    """Until when a file may be shown that KMS cannot be asked for again."""
    return file.decrypted_at_s + cache.lifetime_s + cache.stale_s


def is_same_source(one: Survey, other: Survey) -> bool:
    """Whether nothing changed between two surveys."""
    return [(file.path, file.source_path, file.version) for file in one.files] == [
        (file.path, file.source_path, file.version) for file in other.files
    ] and one.directories == other.directories


def next_due_s(
    files: Mapping[str, RamFile], troubles: Mapping[str, Trouble], cache: CacheSettings
) -> float:
    """When something has to be asked for again, on the clock that runs from boot."""
    expiries = [
        file.decrypted_at_s + cache.lifetime_s
        for path, file in files.items()
        if path not in troubles
    ]
    # A file that is shown past its time is taken away when its last one has come.
    ends = [_last_moment(files[path], cache) for path in troubles if path in files]
    return min((*expiries, *ends, *(t.again_at_s for t in troubles.values())), default=math.inf)


def _differs(old: RamFile, result: Outcome, file: SourceFile) -> bool:
    if isinstance(result, RamFile):
        # It may be newer than the survey.
        return (old.source_path, old.version) != (result.source_path, result.version)
    return not old.is_of(file)


def _is_in(path: str, directory: str) -> bool:
    return not directory or path.startswith(directory + "/")
