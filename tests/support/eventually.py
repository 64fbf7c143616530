"""Waiting for other processes on trio, bounded."""

from collections.abc import Callable

import trio

_PAUSE_S = 0.01


async def eventually(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Return once `condition` holds; fail if it does not in time."""
    for _ in range(int(seconds / _PAUSE_S)):
        if condition():
            return
        await trio.sleep(_PAUSE_S)
    raise AssertionError("it never came true")
