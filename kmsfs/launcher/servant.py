"""What the launcher does for a daemon that may not do it itself, each over a socket of its own."""

import socket
from collections.abc import Iterator
from typing import Protocol

from kmsfs.decryptor import wire
from kmsfs.settings import MountConfig


class Servant(Protocol):
    """Answers one daemon.

    Attributes:
        daemon_end: the daemon's end of its socket; closed here once it is handed over.
    """

    daemon_end: socket.socket

    @property
    def item(self) -> wire.Handed:
        """As what the daemon is handed its end."""

    def fileno(self) -> int:
        """Readable when there is something to answer."""

    def answer(self) -> bool:
        """Answer what has come; False once the daemon has closed its end."""

    def close(self) -> None:
        """Answer no more."""


def servants_of(config: MountConfig) -> Iterator[Servant]:
    """Those that a mount needs.

    Raises:
        KmsfsError: one cannot do what it is for.
        OSError: the source cannot be opened.
    """
    # Imported where they are wanted: most mounts have none, and all of them start.
    if config.run_as is not None:
        from kmsfs.launcher.opener import SourceOpener

        yield SourceOpener(config.source)
    if config.audit is not None:
        from kmsfs.launcher.audit_file import AuditFile

        yield AuditFile(config.audit, view=config.view)
