"""Credentials as a worker keeps them: found once, never refreshed, shared with other workers."""

import time
from contextlib import AbstractContextManager
from typing import Final, Protocol

import msgspec

# Less is not worth beginning with, and whoever has less is to end: clocks differ, and a request
# may take its whole deadline before KMS looks at its signature.
NEAR_EXPIRY_S: Final = 60.0

# How long credentials are good whose source can renew them but does not say when they end.
UNDATED_S: Final = 900.0

# Sources that are read in no time and ask nobody.
STATIC_SOURCES: Final = frozenset(
    {"env", "explicit", "shared-credentials-file", "config-file"}
    | {"ec2-credentials-file", "boto-config"}
)


class SessionCredentials(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Credentials of one moment. The repr shows none of them.

    Attributes:
        source: botocore's name of where they come from.
        ends_at: when they expire, as time.time() has it; None where they do not.
    """

    access_key: str
    secret_key: str
    token: str | None
    account_id: str | None
    source: str
    ends_at: float | None

    def __repr__(self) -> str:
        """The source alone."""
        return f"SessionCredentials(source={self.source!r})"

    @property
    def near_expiry(self) -> bool:
        """Whether others should be found before anything is begun with them."""
        return self.ends_at is not None and time.time() >= self.ends_at - NEAR_EXPIRY_S

    @property
    def shareable(self) -> bool:
        """Whether finding them costs something, and they last long enough to be kept for others."""
        return self.source not in STATIC_SOURCES and not self.near_expiry


class FailedSearch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """That no credentials were found, for whoever was waiting meanwhile: asking a source that
    fails slowly one after the other would use up everybody's time.

    Attributes:
        at: when, as time.monotonic() has it, which is one clock for all processes.
        code, detail: of the `KmsfsError`.
    """

    at: float
    code: str
    detail: str


Kept = SessionCredentials | FailedSearch


class CredentialStore(Protocol):
    """A place outside this process where session credentials rest for other workers."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other workers from reading and finding any meanwhile; waits for its turn."""
        ...

    def read(self) -> Kept | None:
        """What lies there; only within `exclusive`."""
        ...

    def write(self, kept: Kept | None) -> None:
        """Replace what lies there, if it has room; only within `exclusive`."""
        ...

    def discard(self, credentials: SessionCredentials) -> None:
        """Take these away if they lie there; not where another worker is at it, which waits."""
        ...
