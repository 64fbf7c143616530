"""Runs pyfuse3's session loop without its one way of blocking the process.

A program that is killed between the wake-up of its request and our read(2) takes the request
with it, and the read then blocks, with the interpreter's lock held. So readability is asked for
again right before the read.
"""

import logging
import select
from typing import Any, Final

import pyfuse3

# Requests being served at once. A program that waits in open holds one, so the default of 99
# would let a slow KMS freeze the whole mount.
MAX_TASKS: Final = 1024
MIN_TASKS: Final = 4

# Private to pyfuse3; the dependency is held to the minor version that has it.
_HOOK: Final = "_wait_fuse_readable"


log = logging.getLogger(__name__)


def attach(operations: pyfuse3.Operations, fuse_fd: int) -> None:
    """Make `operations` serve a mount that somebody else made; its /dev/fuse is ours from now on.

    A second look is put in front of every read of it.
    """
    pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", {"default_permissions", "fsname=kmsfs"})
    stock: Any = getattr(pyfuse3, _HOOK, None)
    if stock is None:
        log.warning("this pyfuse3 has no hook for a second look before reading requests")
        return
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)

    async def wait_fuse_readable() -> bool:
        while await stock():
            if poll.poll(0):
                return True
        return False

    setattr(pyfuse3, _HOOK, wait_fuse_readable)


async def serve() -> None:
    """Serve requests until the mount is gone or `stop` is called."""
    await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)


def stop() -> None:
    """Have `serve` return; requests that come later are not answered."""
    pyfuse3.terminate()


def close() -> None:
    """Close /dev/fuse; whoever still uses the mount gets ENOTCONN. It is not unmounted."""
    pyfuse3.close(unmount=False)
