"""Notices that something in a source has changed; what it is, a survey tells.

inotify where the source's filesystem has it, through watchfiles; else the source is to be
surveyed every second. Either way a change is noticed well within two seconds.
"""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

import trio

# Changes that follow one another this closely are reported together.
_DEBOUNCE_MS: Final = 200
_STEP_MS: Final = 50

_POLL_S: Final = 1.0

log = logging.getLogger(__name__)


async def changes(root: str, *, has_inotify: bool) -> AsyncIterator[None]:
    """Yield whenever something below `root` may have changed, until cancelled.

    Args:
        has_inotify: whether the kernel reports every change; false on network filesystems.
    Cancellation: the watching thread ends within a tenth of a second.
    """
    if has_inotify:
        # Imported where it is used: the FUSE view watches nothing.
        from watchfiles import awatch

        # Names of files belong in no log line of ours that we did not escape.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        try:
            watching = awatch(
                root, watch_filter=None, debounce=_DEBOUNCE_MS, step=_STEP_MS, recursive=True
            )
            async with contextlib.aclosing(watching) as batches:
                async for _ in batches:
                    yield
        except (OSError, RuntimeError) as error:
            log.warning("the source is polled: inotify cannot watch it (%s)", type(error).__name__)
    while True:
        await trio.sleep(_POLL_S)
        yield
