"""What became of each file last: decrypted, failed, opened. Identifiers and times; no content."""

import time
from dataclasses import dataclass
from typing import Final

from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import KmsfsError
from kmsfs.kms_call import KmsCall
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.source import SourceFile


def boot_clock_s() -> float:
    """Seconds since boot: a clock that nobody sets and that outlives processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Failure:
    """The last thing that went wrong with a file.

    Attributes:
        at_s: when, on the clock that runs from boot.
        call: the request to KMS that ended so, if one was made.
    """

    error: str
    detail: str
    hint: str
    at_s: float
    call: KmsCall | None

    @classmethod
    def of(cls, error: KmsfsError) -> "Failure":
        """An error that was met just now."""
        return cls(error.code, error.detail, error.hint, boot_clock_s(), error.call)


@dataclass(frozen=True, slots=True)
class Success:
    """The last decryption of a file.

    Attributes:
        version: of the ciphertext.
        bound_version: authenticated; None for files that are not bound.
        at_s: when, on the clock that runs from boot.
        at_unix_s: the same as a time of day.
    """

    version: FileVersion
    key_arn: str
    format: str
    bound_version: int | None
    at_s: float
    at_unix_s: float
    call: KmsCall | None

    @property
    def age_s(self) -> float:
        """How long ago it was."""
        return boot_clock_s() - self.at_s


@dataclass(frozen=True, slots=True)
class Opening:
    """The last open of a file: served, from what was held or not, or failed."""

    at_s: float
    from_cache: bool = False
    failure: Failure | None = None


class FileHistory:
    """The last of each kind, by path.

    Attributes:
        failures: of files that were not decrypted since.
    """

    def __init__(self) -> None:
        self.failures: Final[dict[str, Failure]] = {}
        self.successes: Final[dict[str, Success]] = {}
        self.openings: Final[dict[str, Opening]] = {}

    def note_failure(self, path: str, error: KmsfsError) -> None:
        """Remember what is the matter with a file, until it is decrypted."""
        self.failures[path] = Failure.of(error)

    def note_known(self, path: str, error: KmsfsError) -> None:
        """What was the matter with a file is so still: it was not met anew."""
        found = self.failures.get(path)
        if found is None or (found.error, found.detail) != (error.code, error.detail):
            self.note_failure(path, error)

    def note_success(self, file: SourceFile, plaintext: Plaintext) -> None:
        """A file was decrypted just now: nothing is the matter with it any more."""
        self.failures.pop(file.path, None)
        self.successes[file.path] = Success(
            version=file.version,
            key_arn=plaintext.key_arn,
            format=plaintext.format,
            bound_version=plaintext.bound_version,
            at_s=boot_clock_s(),
            at_unix_s=time.time(),
            call=plaintext.call,
        )

    def note_open(
        self, path: str, *, from_cache: bool = False, error: KmsfsError | None = None
    ) -> None:
        """A file was opened just now, or could not be."""
        failure = None if error is None else Failure.of(error)
        self.openings[path] = Opening(boot_clock_s(), from_cache, failure)

    def success_of(self, file: SourceFile) -> Success | None:
        """The last decryption of exactly this ciphertext; None if there was none."""
        found = self.successes.get(file.path)
        return found if found is not None and found.version == file.version else None
