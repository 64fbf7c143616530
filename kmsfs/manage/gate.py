"""How many of a command's worker processes may ask KMS at once."""

import contextlib
import mmap
import os
import select
import time
from collections.abc import Mapping
from typing import Final, Self

from kmsfs.keys.service import (
    DataKey,
    Decryption,
    Encryption,
    KeyService,
    ReEncryption,
)

# Tokens that are lost with a killed process must stop nobody for ever.
_PATIENCE_S: Final = 60.0


class Gate:
    """Lets so many processes through at once. Made before fork, shared by what is forked.

    A token is a byte in a pipe: whoever goes in takes one out, and puts it back afterwards.

    Args:
        tokens: how many at once.
        processes: how many share it; each has a slot number below this.
    """

    def __init__(self, tokens: int, processes: int) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._holds = mmap.mmap(-1, processes)
        self._slot = 0
        os.write(self._write_fd, bytes(tokens))

    def use_slot(self, slot: int) -> None:
        """Say which process this is."""
        self._slot = slot

    def restore(self, slot: int) -> None:
        """Put back the token of a process that was killed inside."""
        if self._holds[slot]:
            self._holds[slot] = 0
            os.write(self._write_fd, b"\0")

    def close(self) -> None:
        """Give its descriptors and memory back."""
        os.close(self._read_fd)
        os.close(self._write_fd)
        self._holds.close()

    def __enter__(self) -> Self:
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        ends_at = time.monotonic() + _PATIENCE_S
        while time.monotonic() < ends_at:
            poll.poll(_PATIENCE_S * 1000)
            # Another process may have been quicker.
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_fd, 1)
                self._holds[self._slot] = 1
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.restore(self._slot)


class GatedKeys:
    """A key service that is asked by so many processes at once as a gate lets through."""

    def __init__(self, keys: KeyService, gate: Gate) -> None:
        self._keys = keys
        self._gate = gate

    def decrypt(
        self, ciphertext: bytes, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> Decryption:
        """As `KeyService.decrypt`."""
        with self._gate:
            return self._keys.decrypt(
                ciphertext, key_id=key_id, encryption_context=encryption_context
            )

    def encrypt(
        self, plaintext: bytes, *, key_id: str, encryption_context: Mapping[str, str]
    ) -> Encryption:
        """As `KeyService.encrypt`."""
        with self._gate:
            return self._keys.encrypt(
                plaintext, key_id=key_id, encryption_context=encryption_context
            )

    def re_encrypt(
        self,
        ciphertext: bytes,
        *,
        source_key_id: str | None,
        key_id: str,
        encryption_context: Mapping[str, str],
    ) -> ReEncryption:
        """As `KeyService.re_encrypt`."""
        with self._gate:
            return self._keys.re_encrypt(
                ciphertext,
                source_key_id=source_key_id,
                key_id=key_id,
                encryption_context=encryption_context,
            )

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """As `KeyService.generate_data_key`."""
        with self._gate:
            return self._keys.generate_data_key(
                key_id=key_id, size_bytes=size_bytes, encryption_context=encryption_context
            )

    def resolve_key_arn(self, key_id: str) -> str:
        """As `KeyService.resolve_key_arn`."""
        with self._gate:
            return self._keys.resolve_key_arn(key_id)
