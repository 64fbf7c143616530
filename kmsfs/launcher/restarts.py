"""How often a daemon that died is replaced."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_RESTARTS: Final = 5
"""A daemon that dies more often within `WINDOW_S` will not live the next time either."""

WINDOW_S: Final = 60.0


class Restarts:
    """Counts deaths.

    Args:
        clock: the present, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: deque[float] = deque()

    def may_follow(self) -> bool:
        """A daemon has died: whether another one is to be started."""
        now = self._clock()
        self._deaths.append(now)
        while now - self._deaths[0] >= WINDOW_S:
            self._deaths.popleft()
        return len(self._deaths) <= MAX_RESTARTS
