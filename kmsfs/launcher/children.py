"""Starting processes of ours: exactly the descriptors meant for them, a clean environment."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from kmsfs.memory import process

_PLAIN_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the AWS libraries look at besides AWS_*: home directory, proxies, certificates.
_ZYGOTE_VARIABLES: Final = frozenset(
    {"HOME", "PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
)


# Left above the plaintexts for the reply buffer and what is on its way.
_MEMLOCK_MARGIN_BYTES: Final = 4 << 20

CAUGHT_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What the launcher has handlers for, and its children have not."""


@dataclass(slots=True)
class Child:
    """A process we started and will wait for."""

    pid: int
    pidfd: int

    def kill(self, number: signal.Signals) -> None:
        """Signal the process, if it still is."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_s: float) -> int | None:
        """Exit code (negative: signal), None if it does not end in time."""
        if not readable(self.pidfd, timeout_s):
            return None
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)

    def kill_now(self, timeout_s: float) -> None:
        """SIGKILL, and wait so long for its end."""
        self.kill(signal.SIGKILL)
        self.wait(timeout_s)


def spawn(
    module: str,
    fds: list[int],
    arguments: list[str],
    environment: dict[str, str],
    *,
    quiet: bool,
) -> Child:
    """Exec a module of ours with these descriptors, whose new numbers lead its arguments.

    -s and -P: neither the user's site-packages nor the current directory may supply code.
    """
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with closing(null_fd):
        # Above every source, so that no copy overwrites one that is still to be made.
        first = max(*fds, null_fd, 2) + 1
        targets = range(first, first + len(fds))
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in zip(fds, targets, strict=True)]
        keep_descriptors()
        actions += [(os.POSIX_SPAWN_DUP2, null_fd, fd) for fd in ((0, 1, 2) if quiet else (0,))]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-s", "-P", "-m", module, *map(str, targets), *arguments],
            environment,
            file_actions=actions,
            setsigdef=CAUGHT_SIGNALS,
        )
    return Child(pid, os.pidfd_open(pid))


def raise_limits(daemon: Child, plaintext_bytes: int) -> None:
    """Those of the daemon; that of locked memory also for the processes started after this.

    Args:
        plaintext_bytes: how much the daemon may hold.
    """
    process.raise_descriptor_limit(process.DAEMON_DESCRIPTORS, pid=daemon.pid)
    wanted_bytes = plaintext_bytes + _MEMLOCK_MARGIN_BYTES
    process.raise_memlock_limit(wanted_bytes)
    process.raise_memlock_limit(wanted_bytes, pid=daemon.pid)


def keep_descriptors() -> None:
    """Let no descriptor that we inherited from whoever started us reach what we exec."""
    for name in os.listdir("/proc/self/fd"):
        # One of them was the listing's own.
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def daemon_environment() -> dict[str, str]:
    """Nothing of the administrator's environment."""
    return {"PATH": _PLAIN_PATH, "LANG": "C.UTF-8"}


def zygote_environment() -> dict[str, str]:
    """Of what the administrator's environment holds, the part that the AWS libraries look at."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in _ZYGOTE_VARIABLES
    }
    return {"PATH": _PLAIN_PATH, **kept, **process.SCRUBBING_ENVIRONMENT}


@contextlib.contextmanager
def memory_file(record: msgspec.Struct) -> Iterator[int]:
    """A descriptor from which a child reads a record as JSON."""
    fd = os.memfd_create("kmsfs-config", os.MFD_CLOEXEC)
    with closing(fd):
        os.write(fd, msgspec.json.encode(record))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd


@contextlib.contextmanager
def closing(fd: int) -> Iterator[None]:
    """Close a descriptor at the end of the block."""
    try:
        yield
    finally:
        os.close(fd)


def readable(fd: int, timeout_s: float) -> bool:
    """Wait until a descriptor turns readable; False if it does not in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
