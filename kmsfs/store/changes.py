"""Which on-change hooks are due: compares what is served with what was served before."""

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from kmsfs.events import Event, Published
from kmsfs.settings import OnChange, path_matches
from kmsfs.store import watch
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.volume import Volume

# Looked at once more so long after a look: a change that came while a new directory was being
# added to the watch on the source may have been missed.
_SETTLE_S: Final = 1.0

ServedFile = tuple[str, FileVersion]
"""Where a served file's ciphertext lies in the source, and which version of it is meant."""

Served = Mapping[str, ServedFile]
"""All files that are served now, by path."""


class Changes:
    """Notices that served files were added, replaced or removed, and says whom that concerns.

    It also listens to events: a set of files that the ramfs view publishes is looked at.

    Args:
        hooks: of the mount; their patterns speak of paths relative to the volume's root.
        served: tells what is served now, given what was; None while nothing is to be compared.
        watched: whether to look whenever the source may have changed.
        told: awaited for each batch of changes, with the paths, and with the number of each hook
            concerned and how many of its files they are.
    """

    def __init__(
        self,
        hooks: tuple[OnChange, ...],
        volume: Volume,
        *,
        served: Callable[[Served], Awaitable[Served | None]],
        watched: bool,
        told: Callable[[frozenset[str], dict[int, int]], Awaitable[None]],
    ) -> None:
        self._hooks = hooks
        self._volume = volume
        self._served = served
        self._watched = watched
        self._told = told
        self._known: Served | None = None
        self._look = trio.Event()

    def emit(self, event: Event) -> None:
        """EventSink: look at a set that was published."""
        if isinstance(event, Published):
            self.look()

    def look(self) -> None:
        """Something may have changed."""
        self._look.set()

    async def take_stock(self) -> None:
        """Take what is served now for what was there in the beginning."""
        self._known = await self._served({}) or {}

    async def run(self) -> None:
        """Compare whenever something may have changed, until cancelled.

        Before stock was taken nothing counts as a change.

        Cancellation: a change that is being told may be told or not.
        """
        source = self._volume.source
        async with trio.open_nursery() as nursery:
            if self._watched:
                nursery.start_soon(
                    functools.partial(
                        watch.follow, source.root, has_inotify=source.is_local, changed=self.look
                    )
                )
            nursery.start_soon(self._compare_when_told)

    async def _compare_when_told(self) -> None:
        while True:
            await self._look.wait()
            self._look = trio.Event()
            await self._compare()
            with trio.move_on_after(_SETTLE_S):
                await self._look.wait()
            await self._compare()

    async def _compare(self) -> None:
        before = self._known
        now = None if before is None else await self._served(before)
        if before is None or now is None:
            return
        self._known = now
        changed = frozenset(
            path for path in before.keys() | now.keys() if before.get(path) != now.get(path)
        )
        if changed:
            await self._told(changed, self._concerned(changed))

    def _concerned(self, changed: frozenset[str]) -> dict[int, int]:
        paths = [self._volume.path_in_volume(path) for path in changed]
        counts = (
            (number, sum(path_matches(hook.match, path) for path in paths))
            for number, hook in enumerate(self._hooks)
        )
        return {number: count for number, count in counts if count}


async def served_from_source(volume: Volume, before: Served) -> Served | None:
    """What a view serves that shows its source as it is; None while the volume is locked.

    Args:
        before: what was served: files of directories that cannot be read now are still those.
    """
    if volume.cache.locked:
        return None
    survey = await volume.survey()
    found = {file.path: (file.source_path, file.version) for file in survey.files}
    for directory in survey.unreadable:
        beneath = f"{directory}/" if directory else ""
        found |= {path: file for path, file in before.items() if path.startswith(beneath)}
    return found
