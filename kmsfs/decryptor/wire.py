"""Frames between launcher, daemon, zygote and workers: bounded, typed, descriptors beside them.

SOCK_SEQPACKET keeps frames apart. A frame is one version byte and one msgpack message; it never
holds plaintext, which travels as a descriptor of locked memory. Anything out of form is a
`WireError`, and its sender is ended.
"""

import array
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from kmsfs.decryptor.rules import DecryptRules
from kmsfs.kms_call import KmsCall
from kmsfs.memory.process import ProcessReport
from kmsfs.settings import MAX_HOOKS

VERSION: Final = 1

# Rules hold an encryption context, which KMS bounds at 8192 bytes, and a path of at most 4096.
MAX_FRAME_BYTES: Final = 64 << 10
MAX_FDS: Final = 1

_FD_BYTES: Final = array.array("i").itemsize
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)
RECEIVE_FLAGS: Final = socket.MSG_CMSG_CLOEXEC


class WireError(Exception):
    """The peer is gone, or sent what no peer of ours sends."""


class DescriptorLostError(WireError):
    """A frame came without its descriptor: this process has as many as it may."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """One frame's message."""


class ZygoteReady(_Message, frozen=True):
    """Zygote to daemon, once, when its imports are done.

    `keeps_credentials`: whether a worker need not ask for session credentials anew: there is
    secret memory in which they go from one to the next, or there are none of that kind.
    """

    pid: int
    credential_source: str | None
    report: ProcessReport
    keeps_credentials: bool


class SpawnWorker(_Message, frozen=True):
    """Daemon to zygote, with the worker's end of a socket pair."""

    id: int


class WorkerSpawned(_Message, frozen=True):
    """Zygote to daemon, with a pidfd of the new worker."""

    id: int
    pid: int


class SpawnFailed(_Message, frozen=True):
    """Zygote to daemon: fork refused."""

    id: int
    detail: str


class Decrypt(_Message, frozen=True):
    """Daemon to worker, with a descriptor of the ciphertext.

    `version` is (dev, ino, size, mtime_ns, ctime_ns) as the daemon saw the descriptor.
    """

    id: int
    rules: DecryptRules
    version: tuple[int, int, int, int, int]
    deadline_s: float


class Decrypted(_Message, frozen=True):
    """Worker to daemon, with the memory that holds the plaintext (none for an empty one).

    `last`: the worker takes no further request.
    `bound_version` is the authenticated `kmsfs:version` of a bound file, `call` what KMS was
    asked for it.
    """

    id: int
    size_bytes: int
    key_arn: str
    format: str
    report: ProcessReport
    last: bool = False
    bound_version: Annotated[int, msgspec.Meta(ge=0)] | None = None
    call: KmsCall | None = None


class Taken(_Message, frozen=True):
    """Daemon to worker: the daemon holds its own lock on the memory; let go of yours."""

    id: int


class Failed(_Message, frozen=True):
    """Worker to daemon: a `KmsfsError` by its code; `last` and `call` as in `Decrypted`."""

    id: int
    code: str
    detail: str
    hint: str | None = None
    last: bool = False
    call: KmsCall | None = None


class AskAnother(_Message, frozen=True):
    """Worker to daemon, its last word: KMS refused credentials that it, or a worker before it,
    had found for an earlier request. Another worker looks for new ones."""

    id: int


Handed = Literal["config", "control", "lock", "opener", "audit", "mount"]


class HandOver(_Message, frozen=True):
    """Launcher to daemon, with one of the descriptors that it needs to begin.

    `config`: the mount's configuration as JSON; `control`: the listening control socket; `lock`:
    memory that outlives the daemon, see `daemon.lock_mark`; `opener`: where a daemon without
    permission asks for files of the source; `audit`: where it sends what is to be recorded;
    `mount`, the last: /dev/fuse, mounted, or the root of the ramfs.
    """

    item: Handed


class KillWorker(_Message, frozen=True):
    """Daemon to zygote: end a worker, which the daemon may not signal itself."""

    pid: int


class OpenSource(_Message, frozen=True):
    """Daemon to launcher: open a path, relative to the source's root, for reading."""

    path: str
    flags: int


class SourceOpened(_Message, frozen=True):
    """Launcher to daemon, with the descriptor."""


class SourceRefused(_Message, frozen=True):
    """Launcher to daemon: it could not be opened."""

    errno: int


class ViewChosen(_Message, frozen=True):
    """Launcher to whoever called it: `auto` became this view because of that."""

    view: str
    reason: str


class Filling(_Message, frozen=True):
    """Daemon to launcher, before it is ready: so many files have been asked for."""

    done: int
    total: int


class FileMissing(_Message, frozen=True):
    """Daemon to launcher, before it is ready: a file could not be decrypted, and why."""

    path: str
    code: str
    detail: str
    hint: str | None = None


class PromiseWeak(_Message, frozen=True):
    """Launcher to whoever called it: a promise that does not hold in full, with `--strict`."""

    promise: str
    grade: str
    evidence: str
    todo: str


class DaemonReady(_Message, frozen=True):
    """Daemon to launcher, once: requests are served from now on."""


class DaemonFailed(_Message, frozen=True):
    """Daemon to launcher: why it cannot start, a `KmsfsError` by its code."""

    code: str
    detail: str
    hint: str | None = None


class ZygoteWanted(_Message, frozen=True):
    """Daemon to launcher: there is no zygote, and something to decrypt."""


class NewZygote(_Message, frozen=True):
    """Launcher to daemon, with the daemon's end of the zygote's control socket."""


class Detached(_Message, frozen=True):
    """Launcher to daemon: unmounted lazily; only what is open still needs plaintext."""


class HooksDue(_Message, frozen=True):
    """Daemon to launcher: served files changed, which these on-change hooks are for.

    `changed`: by a hook's place in the configuration, how many files.
    """

    changed: Annotated[dict[int, int], msgspec.Meta(max_length=MAX_HOOKS)]


class HookReport(_Message, frozen=True):
    """Launcher to daemon: how an on-change hook went so far.

    `problem`: of its last run; empty if that went well.
    """

    hook: int
    runs: int
    failures: int
    problem: str


Message = (
    ZygoteReady
    | SpawnWorker
    | WorkerSpawned
    | SpawnFailed
    | Decrypt
    | Decrypted
    | Taken
    | Failed
    | AskAnother
    | HandOver
    | KillWorker
    | OpenSource
    | SourceOpened
    | SourceRefused
    | ViewChosen
    | Filling
    | FileMissing
    | PromiseWeak
    | DaemonReady
    | DaemonFailed
    | ZygoteWanted
    | NewZygote
    | Detached
    | HooksDue
    | HookReport
)

Told = ViewChosen | Filling | FileMissing | PromiseWeak
"""What whoever asked for a mount may want to know before it is ready."""

_MUST_CARRY: Final = (SpawnWorker, WorkerSpawned, Decrypt, HandOver, NewZygote, SourceOpened)
_MAY_CARRY: Final = (Decrypted,)

# What msgspec raises for bytes that are no message: besides its own errors those of text that is
# not UTF-8 and of nesting beyond the interpreter's limit.
_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame.

    Raises:
        WireError: larger than MAX_FRAME_BYTES, or with text that is not UTF-8.
    """
    try:
        frame = bytes((VERSION,)) + _encoder.encode(message)
    except UnicodeEncodeError:
        raise WireError(f"a {type(message).__name__} with text that is not UTF-8") from None
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} frame of {len(frame)} bytes is too large")
    return frame


def fds_ancillary(fds: Sequence[int]) -> "list[tuple[int, int, array.array[int]]]":
    """Ancillary data for sendmsg that carries descriptors."""
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def decode(
    frame: bytes, ancillary: Iterable[tuple[int, int, bytes]], flags: int
) -> tuple[Message, int | None]:
    """Take a received frame apart: the message, and the descriptor that came with it.

    Every descriptor received is either returned or closed.

    Raises:
        DescriptorLostError: this process can take no descriptor.
        WireError: end of file, truncated, another version, not a message, descriptors that do
            not belong to this kind of message.
    """
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    try:
        if not frame:
            raise WireError("the peer closed its end")
        if flags & socket.MSG_CTRUNC and not fds:
            raise DescriptorLostError("no descriptor is left for what was sent")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise WireError("a truncated frame")
        if frame[0] != VERSION:
            raise WireError(f"a frame of version {frame[0]}, not {VERSION}")
        try:
            message: Message = _decoder.decode(memoryview(frame)[1:])
        except _UNDECODABLE as error:
            # The class name only: the error's text may quote the frame.
            raise WireError(f"not a message: {type(error).__name__}") from None
        wanted = 1 if isinstance(message, _MUST_CARRY) else 0
        at_most = 1 if isinstance(message, _MAY_CARRY) else wanted
        if not wanted <= len(fds) <= at_most:
            raise WireError(f"{len(fds)} descriptors with a {type(message).__name__}")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, (fds[0] if fds else None)


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one frame on a blocking socket.

    Raises:
        WireError: too large, or the peer is gone.
    """
    try:
        sock.sendmsg([encode(message)], fds_ancillary(fds), socket.MSG_NOSIGNAL)
    except OSError as error:
        raise WireError(f"cannot send: {error.strerror}") from error


def receive(sock: socket.socket) -> tuple[Message, int | None]:
    """Receive one frame on a blocking socket; see `decode`."""
    arguments = (MAX_FRAME_BYTES + 1, ANCILLARY_BYTES, RECEIVE_FLAGS)
    try:
        try:
            frame, ancillary, flags, _ = sock.recvmsg(*arguments)
        except ConnectionResetError:
            # Said once, before its last words, of a peer that ended without reading all of ours.
            frame, ancillary, flags, _ = sock.recvmsg(*arguments)
    except OSError as error:
        # A time-out has no strerror.
        raise WireError(f"cannot receive: {error.strerror or error}") from error
    return decode(frame, ancillary, flags)


def expect(received: tuple[Message, int | None], wanted: type[Any]) -> tuple[Any, int | None]:
    """Hold a received message against the one type that may come now.

    Raises:
        WireError: it is another; its descriptor is closed.
    """
    message, fd = received
    if not isinstance(message, wanted):
        if fd is not None:
            os.close(fd)
        raise WireError(f"{type(message).__name__} where {wanted.__name__} was due")
    return message, fd
