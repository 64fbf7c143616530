"""What a confined process must not be able to do, each tried for real.

`Attempts.outcomes` is run in the process in question; the same attempts in a process that is not
confined are the control: there every one must succeed.
"""

import contextlib
import ctypes
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

# linux/ptrace.h: attaches without stopping.
_PTRACE_SEIZE = 0x4206

REFUSED = frozenset({"EPERM", "EACCES"})

WRITING = (
    "create a file",
    "open a file for writing",
    "open a file for both",
    "cut a file",
    "remove a file",
    "rename a file",
    "link a file",
    "make a symbolic link",
    "make a directory",
    "make a socket",
)
LOOKING = ("exec", "ptrace", "read another process's memory", "write another process's memory")
LISTENING = ("listen by TCP", "listen by UNIX socket")


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True)
class Attempts:
    """Attempts in one directory, which must be empty but for what `prepare` put there.

    Attributes:
        port: of 127.0.0.1, where somebody listens.
    """

    directory: Path
    port: int = 0

    def prepare(self) -> None:
        """Make the files that are to be changed."""
        for name in ("file", "cut", "remove", "rename", "link"):
            (self.directory / name).write_bytes(b"content")

    def outcomes(self, *names: str) -> dict[str, str]:
        """By name: `done`, or the name of the errno."""
        calls = self._calls()
        return {name: _outcome(calls[name]) for name in names or calls}

    def _calls(self) -> dict[str, Callable[[], object]]:
        at = self.directory
        return {
            "exec": _exec,
            "ptrace": _ptrace,
            "read another process's memory": lambda: _other_memory("process_vm_readv"),
            "write another process's memory": lambda: _other_memory("process_vm_writev"),
            "create a file": lambda: _open(at / "new", os.O_WRONLY | os.O_CREAT),
            "open a file for writing": lambda: _open(at / "file", os.O_WRONLY),
            "open a file for both": lambda: _open(at / "file", os.O_RDWR),
            "cut a file": lambda: os.truncate(at / "cut", 1),
            "remove a file": (at / "remove").unlink,
            "rename a file": lambda: (at / "rename").rename(at / "renamed"),
            "link a file": lambda: os.link(at / "link", at / "linked"),
            "make a symbolic link": lambda: (at / "symbolic").symlink_to("file"),
            "make a directory": (at / "directory").mkdir,
            "make a socket": lambda: os.mknod(at / "node", 0o140600),
            "make a TCP socket": lambda: _socket(socket.AF_INET, socket.SOCK_STREAM),
            "make a UDP socket": lambda: _socket(socket.AF_INET6, socket.SOCK_DGRAM),
            "make a packet socket": lambda: _socket(socket.AF_PACKET, socket.SOCK_RAW),
            "connect by TCP": self._connect,
            "listen by TCP": lambda: _listen(("127.0.0.1", 0)),
            "listen by UNIX socket": lambda: _listen(f"\0kmsfs-test-{os.getpid()}"),
        }

    def _connect(self) -> None:
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.connect(("127.0.0.1", self.port))


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    return "done"


def _exec() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    assert os.waitpid(pid, 0)[1] == 0


@contextlib.contextmanager
def _paused_child() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ptrace() -> None:
    with _paused_child() as pid:
        if _libc.ptrace(_PTRACE_SEIZE, pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")


def _other_memory(name: str) -> None:
    """Of a child: what lies here lies there at the same address."""
    theirs, ours = ctypes.create_string_buffer(16), ctypes.create_string_buffer(16)
    local = _Vector(ctypes.addressof(ours), 16)
    remote = _Vector(ctypes.addressof(theirs), 16)
    call = getattr(_libc, name)
    call.restype = ctypes.c_ssize_t
    with _paused_child() as pid:
        if call(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != 16:
            raise OSError(ctypes.get_errno(), name)


def _open(path: Path, flags: int) -> None:
    os.close(os.open(path, flags, 0o600))


def _socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def _listen(address: object) -> None:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind(address)
        sock.listen()
