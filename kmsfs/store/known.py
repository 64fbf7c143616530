"""Names and attributes for a view, in bounded time, also while the source does not answer.

What was seen before is answered as it was then, until the source answers again. Only metadata:
an open asks the source itself, and fails where that does not answer.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import trio

from kmsfs.errors import SourceMissing
from kmsfs.store.names import join
from kmsfs.store.source import SourceNode
from kmsfs.store.volume import Volume

METADATA_DEADLINE_S: Final = 5.0
"""Within this every request for metadata ends."""

# How long what is known already may take to be looked at anew.
_PATIENCE_S: Final = 1.0

# Requests that wait for a source that hangs; further ones end at their deadline unasked.
_THREADS: Final = 64

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Call:
    """A request to the source, in a thread that cannot be stopped."""

    ended: bool = False


class KnownTree:
    """The volume's metadata, as a view is asked for it. On a local disk nothing is remembered."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._source = volume.source
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._nodes: dict[str, SourceNode] = {}
        self._listings: dict[str, list[SourceNode]] = {}
        # Calls that are late, shared with their threads. While there are any, nobody waits for
        # the source who can be told what was there before.
        self._late: set[_Call] = set()
        self._late_lock = threading.Lock()

    async def look_up(self, directory: str, name: str) -> SourceNode | None:
        """What is served as `name` in a directory; None if nothing is.

        Raises:
            trio.TooSlowError: the source does not answer, and it was not seen before.
        """
        if self._source.is_local:
            return await self._volume.look_up(directory, name)
        path = join(directory, name)
        known = self._nodes.get(path)
        found: SourceNode | None = await self._ask(
            partial(self._source.lookup, directory, name), known
        )
        self._note(path, found)
        return found

    async def node_at(self, path: str) -> SourceNode | None:
        """What is served at `path`; the root is the empty string.

        Raises:
            trio.TooSlowError: see `look_up`.
        """
        if self._source.is_local:
            return await self._volume.node_at(path)
        if path:
            directory, _, name = path.rpartition("/")
            return await self.look_up(directory, name)
        known = self._nodes.get("")
        found: SourceNode | None = await self._ask(partial(self._source.directory, ""), known)
        self._note("", found)
        return found

    async def list_directory(self, path: str) -> list[SourceNode]:
        """Everything served in a directory.

        Raises:
            SourceMissing, SourceUnreadable.
            trio.TooSlowError: see `look_up`.
        """
        if self._source.is_local:
            with trio.fail_after(METADATA_DEADLINE_S):
                return await self._volume.list_directory(path)
        known = self._listings.get(path)
        try:
            found = await self._ask(partial(self._source.list_directory, path), known)
        except SourceMissing:
            self._listings.pop(path, None)
            raise
        assert found is not None, "a listing is never None"
        self._listings[path] = found
        for node in found:
            self._note(node.path, node)
        return found

    def _note(self, path: str, node: SourceNode | None) -> None:
        # Names that lead nowhere are not kept: anybody can ask for any number of them.
        if node is None:
            self._nodes.pop(path, None)
        else:
            self._nodes[path] = node

    async def _ask(self, ask: Callable[[], T | None], known: T | None) -> T | None:
        """Ask the source; for what is `known` not for long, and not at all while it hangs."""
        if known is not None and self._late:
            return known
        call = _Call()

        def ask_and_end() -> T | None:
            try:
                return ask()
            finally:
                with self._late_lock:
                    call.ended = True
                    # It answers again.
                    self._late.clear()

        patience_s = math.inf if known is None else _PATIENCE_S
        with trio.fail_after(METADATA_DEADLINE_S), trio.move_on_after(patience_s):
            return await trio.to_thread.run_sync(
                ask_and_end, abandon_on_cancel=True, limiter=self._limiter
            )
        with self._late_lock:
            if not call.ended:
                self._late.add(call)
        return known
