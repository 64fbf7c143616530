"""Runs pyfuse3's session loop without its one way of blocking the process.

A program that is killed between the wake-up of its request and our read(2) takes the request
with it, and the read then blocks, with the interpreter's lock held. So readability is asked for
again right before the read.
"""

import select
from typing import Any, Final

import pyfuse3
import trio

# Requests being served at once. A program that waits in open holds one, so the default of 99
# would let a slow KMS freeze the whole mount.
MAX_TASKS: Final = 1024
MIN_TASKS: Final = 4

# Private to pyfuse3; the dependency is held to the minor version that has it.
_HOOK: Final = "_wait_fuse_readable"


def install(fuse_fd: int) -> bool:
    """Put the second look in front of every read; False where pyfuse3 has no such place."""
    stock: Any = getattr(pyfuse3, _HOOK, None)
    if stock is None:
        return False
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)

    async def wait_fuse_readable() -> bool:
        while await stock():
            if poll.poll(0):
                return True
        return False

    setattr(pyfuse3, _HOOK, wait_fuse_readable)
    return True


async def serve(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve requests until the mount is gone or `pyfuse3.terminate` is called."""
    task_status.started()
    await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
