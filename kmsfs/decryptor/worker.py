"""The worker: one request at a time, credentials, KMS, decrypt, reply; ends when told or idle.

Credentials are found once. With them the process gives up whatever it needed to find them: exec,
other ports than those of KMS, writing to files. So it ends when they do, and where KMS refuses
them, and a new worker finds others.

What botocore leaves in this process's heap cannot be wiped; the process's end is the eraser.
Until then freed memory is overwritten, nothing is swapped, and nothing can be dumped.
"""

import os
import socket
import stat
import time
from typing import Final, NoReturn

from kmsfs.decryptor import wire
from kmsfs.decryptor.credential_cache import CredentialCache
from kmsfs.decryptor.decrypt import decrypt_ciphertext
from kmsfs.errors import (
    CiphertextChanging,
    CredentialsUnavailable,
    FileTooLarge,
    KmsfsError,
    SourceUnreadable,
    WorkerBug,
)
from kmsfs.keys.aws import AwsKeyService
from kmsfs.memory import process, sandbox
from kmsfs.memory.mapping import LockedMapping, create_secret_memory
from kmsfs.memory.sandbox import SandboxReport
from kmsfs.settings import KmsSettings

# An Encryption SDK message is longer than its plaintext by its header (at most 64 KiB of
# encryption context and some wrapped keys), 32 bytes a frame and a footer. Frames of 64 bytes
# or more keep within twice the plaintext plus this.
_CIPHERTEXT_OVERHEAD_BYTES: Final = 256 << 10

_READ_BYTES: Final = 1 << 20

# A detail may quote a header of up to 64 KiB; so much of it fits a frame and a log line.
_MAX_DETAIL: Final = 1000


class Outbox:
    """The memory one plaintext is written into, kept locked until the daemon has it.

    Args:
        may_be_unlocked: where it cannot be locked it is used all the same.
    """

    def __init__(self, *, may_be_unlocked: bool = False) -> None:
        self._may_be_unlocked = may_be_unlocked
        self._fd: int | None = None
        self._mapping: LockedMapping | None = None
        self._view: memoryview | None = None

    @property
    def fd(self) -> int | None:
        """Descriptor to hand over; None while empty."""
        return self._fd

    def allocate(self, size_bytes: int) -> memoryview:
        """The buffer for a plaintext of this size; once per outbox.

        Raises:
            LockedMemoryExhausted: no locked memory.
        """
        if size_bytes == 0:
            return memoryview(bytearray())
        if self._mapping is not None:
            raise WorkerBug("a second plaintext for one request")
        unlocked = self._may_be_unlocked
        self._fd, kind = create_secret_memory(size_bytes, may_be_unlocked=unlocked)
        self._mapping = LockedMapping.of(self._fd, kind, may_be_unlocked=unlocked)
        self._view = self._mapping.borrow(size_bytes)
        return self._view

    def filled(self) -> None:
        """No more is written: take the view back."""
        if self._view is not None and self._mapping is not None:
            self._mapping.take_back(self._view)
            self._view = None

    def let_go(self, *, wipe: bool) -> None:
        """Close this end; wiped unless the daemon took the memory over."""
        self.filled()
        if self._mapping is not None:
            if wipe:
                self._mapping.wipe()
            self._mapping.release()
            self._mapping = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def version_of(fd: int) -> tuple[int, int, int, int, int]:
    """(dev, ino, size, mtime_ns, ctime_ns) of an open file."""
    info = os.fstat(fd)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def read_ciphertext(fd: int, version: tuple[int, int, int, int, int], max_bytes: int) -> bytes:
    """Read a whole file that must stay the same meanwhile.

    Raises:
        CiphertextChanging: it is not the announced version, before or after.
        FileTooLarge: more than `max_bytes`.
        SourceUnreadable: the disk says no.
    """
    try:
        if version_of(fd) != version:
            raise CiphertextChanging("the file changed before it was read")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SourceUnreadable("not a regular file")
        size_bytes = version[2]
        if size_bytes > max_bytes:
            raise FileTooLarge(f"{size_bytes} bytes of ciphertext, {max_bytes} at most")
        parts: list[bytes] = []
        offset = 0
        while offset < size_bytes:
            part = os.pread(fd, min(_READ_BYTES, size_bytes - offset), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
        if version_of(fd) != version:
            raise CiphertextChanging("the file changed while it was read")
    except OSError as error:
        raise SourceUnreadable(f"cannot read the ciphertext: {error.strerror}") from error
    return b"".join(parts)


class Worker:
    """Serves requests from one socket until it closes."""

    def __init__(
        self,
        sock: socket.socket,
        settings: KmsSettings,
        cache: CredentialCache | None,
        *,
        memory_locked: bool,
    ) -> None:
        self._sock = sock
        self._memory_locked = memory_locked
        self._sandbox: SandboxReport | None = None
        self._keys = AwsKeyService(settings, confine=self._confine, store=cache)

    def _confine(self, connect_ports: frozenset[int]) -> None:
        self._sandbox = sandbox.confine_worker(connect_ports)

    def run(self) -> None:
        """Serve until the daemon closes its end or breaks the protocol, or credentials end."""
        while not self._keys.worn:
            try:
                request, fd = wire.expect(wire.receive(self._sock), wire.Decrypt)
            except wire.WireError:
                return
            if fd is None:
                return
            try:
                self._serve(request, fd)
            except wire.WireError:
                return

    def _serve(self, request: wire.Decrypt, fd: int) -> None:
        outbox = Outbox(may_be_unlocked=request.rules.allow_unlocked)
        taken = False
        try:
            reply = self._decrypt(request, fd, outbox)
            outbox.filled()
            os.close(fd)
            fd = -1
            if not isinstance(reply, wire.Decrypted):
                wire.send(self._sock, reply)
                return
            wire.send(self._sock, reply, [outbox.fd] if outbox.fd is not None else [])
            acknowledgement, _ = wire.expect(wire.receive(self._sock), wire.Taken)
            taken = acknowledgement.id == request.id
        finally:
            if fd >= 0:
                os.close(fd)
            outbox.let_go(wipe=not taken)

    def _decrypt(
        self, request: wire.Decrypt, fd: int, outbox: Outbox
    ) -> wire.Decrypted | wire.Failed | wire.AskAnother:
        started = time.monotonic()
        rules = request.rules
        try:
            ciphertext = read_ciphertext(
                fd, request.version, 2 * rules.max_plaintext_bytes + _CIPHERTEXT_OVERHEAD_BYTES
            )
            remaining_s = request.deadline_s - (time.monotonic() - started)
            self._keys.set_deadline(remaining_s)
            self._keys.prepare(rules.key_ids)
            info = decrypt_ciphertext(ciphertext, rules, self._keys, outbox.allocate)
        except KmsfsError as error:
            if isinstance(error, CredentialsUnavailable) and self._keys.refused_what_was_kept:
                return wire.AskAnother(id=request.id)
            hint = error.hint if error.hint != type(error).hint else None
            return wire.Failed(
                id=request.id,
                code=error.code,
                detail=_printable(error.detail),
                hint=hint,
                last=self._keys.worn,
                call=error.call,
            )
        except Exception as error:  # noqa: BLE001 - one bad file must not end in a dead worker
            # The class name only: a foreign exception's text may hold content.
            return wire.Failed(
                id=request.id,
                code=WorkerBug.__name__,
                detail=type(error).__name__,
                last=self._keys.worn,
            )
        return wire.Decrypted(
            id=request.id,
            size_bytes=info.size_bytes,
            key_arn=info.key_arn,
            format=info.format,
            report=process.report(memory_locked=self._memory_locked, sandbox=self._sandbox),
            last=self._keys.worn,
            bound_version=info.bound_version,
            call=info.call,
        )


def _printable(detail: str) -> str:
    """A detail as a frame takes it: of bounded length, in UTF-8."""
    return detail[:_MAX_DETAIL].encode("utf-8", "backslashreplace").decode()


def main(
    sock: socket.socket, settings: KmsSettings, zygote_pid: int, cache: CredentialCache | None
) -> NoReturn:
    """Be a worker in a freshly forked process; never returns.

    Memory is locked before there are credentials. Exit skips the interpreter's own clean-up:
    the kernel frees everything at once, and nothing runs on what is left.
    """
    status = 70
    try:
        process.end_with_parent(zygote_pid)
        process.harden("kmsfs-worker")
        memory_locked = process.lock_all_memory()
        Worker(sock, settings, cache, memory_locked=memory_locked).run()
        status = 0
    finally:
        os._exit(status)
