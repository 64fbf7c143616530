"""Session credentials between one worker and the next, in memory that the zygote never maps.

Made before the first fork, inherited by every worker, gone when the zygote and the last worker
are. The content is a length and JSON. memfd_secret only: other memory could be read by root
through /proc, or be swapped out.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Final

import msgspec

from kmsfs import libc
from kmsfs.errors import LockedMemoryExhausted
from kmsfs.keys.credentials import Kept, SessionCredentials
from kmsfs.memory.mapping import LockedMapping

# Session tokens take some 1 to 4 KiB.
_SIZE_BYTES: Final = 16 << 10
_LENGTH_BYTES: Final = 4

_decoder: Final[msgspec.json.Decoder[Kept]] = msgspec.json.Decoder(Kept)


class CredentialCache:
    """A `CredentialStore` on one descriptor of memfd_secret, which is its owner's for good."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> "CredentialCache | None":
        """An empty one, not mapped; None where the kernel has no memfd_secret."""
        try:
            fd = libc.memfd_secret()
        except OSError:
            return None
        os.ftruncate(fd, _SIZE_BYTES)
        return cls(fd)

    def close(self) -> None:
        """Give the memory back; the kernel zeroes it once no worker holds it either."""
        os.close(self._fd)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """As `CredentialStore.exclusive`; a holder's end gives its turn away.

        A record lock, since flock belongs to the open file, which all workers share.
        """
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def read(self) -> Kept | None:
        """As `CredentialStore.read`."""
        with self._mapped() as view:
            if view is None:
                return None
            length = int.from_bytes(view[:_LENGTH_BYTES], "little")
            if not 0 < length <= _SIZE_BYTES - _LENGTH_BYTES:
                return None
            with view[_LENGTH_BYTES : _LENGTH_BYTES + length] as content:
                try:
                    return _decoder.decode(content)
                except msgspec.DecodeError:
                    # A worker that was killed while it wrote.
                    return None

    def write(self, kept: Kept | None) -> None:
        """As `CredentialStore.write`."""
        content = b"" if kept is None else msgspec.json.encode(kept)
        with self._mapped() as view:
            if view is None:
                return
            view[:] = bytes(len(view))
            if len(content) <= _SIZE_BYTES - _LENGTH_BYTES:
                view[_LENGTH_BYTES : _LENGTH_BYTES + len(content)] = content
                view[:_LENGTH_BYTES] = len(content).to_bytes(_LENGTH_BYTES, "little")

    def discard(self, credentials: SessionCredentials) -> None:
        """As `CredentialStore.discard`."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            if self.read() == credentials:
                self.write(None)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[memoryview | None]:
        """The memory, for as long as it takes; None where no more may be locked."""
        try:
            mapping = LockedMapping.of(self._fd, "memfd_secret")
        except LockedMemoryExhausted:
            yield None
            return
        view = mapping.borrow(_SIZE_BYTES)
        try:
            yield view
        finally:
            mapping.take_back(view)
            mapping.release()
