"""Notices that something in a source has changed; what it is, a survey tells.

inotify where the source's filesystem has it, through watchfiles; else the source is to be
surveyed every second. Either way a change is noticed well within two seconds.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Final

import trio

# Changes that follow one another this closely are reported together.
_DEBOUNCE_MS: Final = 200
_STEP_MS: Final = 50

_POLL_S: Final = 1.0

log = logging.getLogger(__name__)


async def follow(root: str, *, has_inotify: bool, changed: Callable[[], None]) -> None:
    """Call `changed` whenever something below `root` may have changed, until cancelled.

    Args:
        has_inotify: whether the kernel reports every change; false on network filesystems.
    Cancellation: the watching thread has ended, within a tenth of a second.
    """
    if has_inotify:
        try:
            await _follow_by_inotify(root, changed)
        except (OSError, RuntimeError) as error:
            # The class name only: the text names files, which may hold anything.
            name = type(error).__name__
            log.warning("inotify cannot watch the source (%s): it is polled", name)
    while True:
        await trio.sleep(_POLL_S)
        changed()


async def _follow_by_inotify(root: str, changed: Callable[[], None]) -> None:
    # Imported where it is used: the FUSE view watches nothing.
    from watchfiles import awatch

    # At lower levels it logs the names of files as they are.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    stop = trio.Event()
    failure: OSError | RuntimeError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, stop)
        watching = awatch(
            root, watch_filter=None, debounce=_DEBOUNCE_MS, step=_STEP_MS, stop_event=stop
        )
        try:
            async with contextlib.aclosing(watching):
                async for _ in watching:
                    changed()
        except (OSError, RuntimeError) as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _set_when_cancelled(stop: trio.Event) -> None:
    """The watching thread does not see a cancellation, only this."""
    try:
        await trio.sleep_forever()
    finally:
        stop.set()
