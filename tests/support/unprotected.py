"""kmsfs without confinement, secret memory and scrubbing: what a benchmark holds it against.

    python -m tests.support.unprotected PYTHON -m kmsfs COMMAND...

The command runs in this process, with parts of it replaced, and so do the daemon and the zygote
that its launcher starts. Memory is locked all the same. There is no way to have this from kmsfs
itself.
"""

import errno
import os
import runpy
import sys
from collections.abc import Collection
from pathlib import Path

from kmsfs import libc
from kmsfs.launcher import children
from kmsfs.memory import process, sandbox
from kmsfs.memory.sandbox import SandboxReport

_ROOT = Path(__file__).parents[2]

_NOTHING = SandboxReport(landlock_abi=0, seccomp=False)

_spawn = children.spawn


def spawn_unprotected(
    module: str,
    fds: list[int],
    arguments: list[str],
    environment: dict[str, str],
    *,
    quiet: bool,
) -> children.Child:
    """Stand-in for `children.spawn`: this module in place of the other, which it then runs."""
    environment = {**environment, "PYTHONPATH": str(_ROOT)}
    for name in process.SCRUBBING_ENVIRONMENT:
        environment.pop(name, None)
    return _spawn("tests.support.unprotected", fds, [*arguments, module], environment, quiet=quiet)


def no_memfd_secret() -> int:
    """Stand-in for `libc.memfd_secret`."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def confine_no_daemon(_fill_beneath: int | None) -> SandboxReport:
    """Stand-in for `sandbox.confine_daemon`."""
    return _NOTHING


def confine_no_worker(_connect_ports: Collection[int]) -> SandboxReport:
    """Stand-in for `sandbox.confine_worker`."""
    return _NOTHING


def main(argv: list[str]) -> None:
    """Be the command, the daemon or the zygote."""
    libc.memfd_secret = no_memfd_secret
    sandbox.confine_daemon = confine_no_daemon
    sandbox.confine_worker = confine_no_worker
    children.spawn = spawn_unprotected
    module, arguments = ("kmsfs", argv[3:]) if argv[1] == "-m" else (argv[-1], argv[:-1])
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
