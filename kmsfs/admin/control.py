"""The control socket: what the commands say to a running mount, its answers, and the asking.

One request and one answer per connection, each a line of JSON. The daemon answers root and the
mounting user (SO_PEERCRED), nobody else.
"""

import os
import socket
import struct
from typing import Final

import msgspec

from kmsfs.admin.status import FileReport, HeldPlaintext, MountStatus, NamedProblem
from kmsfs.error_codes import from_code
from kmsfs.errors import ControlUnavailable

# A request may name a path, of 4096 bytes at most, each of which JSON may write as six.
MAX_REQUEST_BYTES: Final = 32 << 10
_MAX_ANSWER_BYTES: Final = 16 << 20

# Locking, and walking a large source, may take a while.
ANSWER_S: Final = 60.0

_UCRED: Final = struct.Struct("iII")


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """One line."""


class StatusRequest(_Message, frozen=True):
    """Ask for a `StatusAnswer`."""


class LockRequest(_Message, frozen=True):
    """Wipe everything and serve nothing until unlocked."""


class UnlockRequest(_Message, frozen=True):
    """Serve again."""


class RefreshRequest(_Message, frozen=True):
    """Read again what is served at or below a path; see `Refreshed`.

    Attributes:
        path: relative to the mountpoint; empty for everything.
        accept_older: serve what lies there though a newer version was seen.
    """

    path: str = ""
    accept_older: bool = False


class WhyRequest(_Message, frozen=True):
    """Ask for a `WhyAnswer`.

    Attributes:
        path: of a file, relative to the mountpoint.
    """

    path: str


class StatusAnswer(_Message, frozen=True):
    """The mount as it is."""

    status: MountStatus


class Locked(_Message, frozen=True):
    """Every plaintext is wiped, but for files of the ramfs view that programs hold.

    Attributes:
        wiped: number of plaintexts.
        held: of those, the ones that cannot be wiped yet.
    """

    wiped: int
    held: tuple[HeldPlaintext, ...] = ()


class Unlocked(_Message, frozen=True):
    """It serves again.

    Attributes:
        missing: files that the ramfs view could not fill in.
        filled: whether it is done with that.
    """

    missing: tuple[NamedProblem, ...] = ()
    filled: bool = True


class Refreshed(_Message, frozen=True):
    """KMS was asked again, or will be at the next open of each file.

    Attributes:
        failed: files that cannot be read now, or not anew.
        finished: whether all files were asked for in the time there was.
    """

    failed: tuple[NamedProblem, ...] = ()
    finished: bool = True


class WhyAnswer(_Message, frozen=True):
    """What is remembered of one file."""

    file: FileReport


class Refused(_Message, frozen=True):
    """It has not, with a `KmsfsError` by its code."""

    code: str
    detail: str
    hint: str | None = None


Request = StatusRequest | LockRequest | UnlockRequest | RefreshRequest | WhyRequest
Answer = StatusAnswer | Locked | Unlocked | Refreshed | WhyAnswer | Refused

_answer_decoder: Final[msgspec.json.Decoder[Answer]] = msgspec.json.Decoder(Answer)


UCRED_BYTES: Final = _UCRED.size


def parse_credentials(ucred: bytes) -> tuple[int, int]:
    """(pid, uid) from SO_PEERCRED: of who connected or, from the other end, who listens."""
    pid, uid, _gid = _UCRED.unpack(ucred)
    return pid, uid


def socket_directory(uid: int) -> str:
    """Where the control sockets of this user's mounts are.

    Raises:
        ControlUnavailable: not root, and no XDG_RUNTIME_DIR.
    """
    if uid == 0:
        return "/run/kmsfs/ctl"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise ControlUnavailable(
            "XDG_RUNTIME_DIR is not set", hint="log in through PAM, or set XDG_RUNTIME_DIR"
        )
    return os.path.join(runtime, "kmsfs")


def socket_path(device: str, uid: int) -> str:
    """Path of the control socket of the mount with this device number (`major:minor`)."""
    return os.path.join(socket_directory(uid), device.replace(":", "-") + ".sock")


def connect(device: str, uid: int) -> socket.socket:
    """Connect to a mount's control socket.

    Raises:
        ControlUnavailable: nobody listens.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(ANSWER_S)
    try:
        sock.connect(socket_path(device, uid))
    except OSError as error:
        sock.close()
        raise ControlUnavailable(
            f"the mount does not answer on its control socket: {error.strerror}",
            hint="it belongs to another user, or its daemon was killed: see `kmsfs umount`",
        ) from error
    return sock


def call(device: str, uid: int, request: Request) -> Answer:
    """Ask and wait for the answer.

    Raises:
        ControlUnavailable: nobody listens, or the answer did not come.
        KmsfsError: what the daemon refused with.
    """
    with connect(device, uid) as sock:
        try:
            sock.sendall(msgspec.json.encode(request) + b"\n")
            parts: list[bytes] = []
            received_bytes = 0
            while part := sock.recv(1 << 16):
                parts.append(part)
                received_bytes += len(part)
                if received_bytes > _MAX_ANSWER_BYTES:
                    raise ControlUnavailable("the answer is too long")
        except OSError as error:
            raise ControlUnavailable(f"no answer from the mount: {error}") from error
    try:
        answer = _answer_decoder.decode(b"".join(parts))
    except msgspec.DecodeError as error:
        raise ControlUnavailable("the mount refused to answer, or ended meanwhile") from error
    if isinstance(answer, Refused):
        raise from_code(answer.code, answer.detail, answer.hint)
    return answer
