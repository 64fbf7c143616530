"""Processes at their limits: of descriptors, of locked memory."""

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_descriptor_left(*, but: int = 0) -> Iterator[None]:
    """In this process: what is open stays open, and nothing else can be opened.

    Args:
        but: so many that can.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(but + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def out_of_descriptors(pid: int) -> Iterator[None]:
    """The same for another process."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def limited(**limits: str) -> tuple[str, ...]:
    """A prefix that runs a command under limits, written as for `prlimit`: `nofile="100:200"`.

    It has none of the capabilities that know no limit.
    """
    capabilities = "-ipc_lock,-sys_resource"
    options = [f"--{name}={value}" for name, value in limits.items()]
    return (
        *("prlimit", *options),
        *("setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"),
    )
