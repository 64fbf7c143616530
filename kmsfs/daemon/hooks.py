"""The daemon's part of on-change hooks: it notices changes and tells the launcher, which runs."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from kmsfs.admin.status import HookStatus
from kmsfs.decryptor import wire
from kmsfs.events import Event
from kmsfs.settings import MountConfig
from kmsfs.store.changes import Changes, Served, served_from_source
from kmsfs.store.volume import Volume
from kmsfs.views.ram import RamView
from kmsfs.views.serving import View

Forget = Callable[[frozenset[str]], Awaitable[None]]
"""Has the kernel drop what it believes of files whose ciphertext has changed."""


class HookWatch:
    """Watches for what the mount's on-change hooks are for. Without hooks it does nothing.

    Args:
        forget: of a view whose files the kernel remembers; None of another.
        say: sends the launcher a message.
    """

    def __init__(
        self,
        config: MountConfig,
        volume: Volume,
        view: View,
        *,
        forget: Forget | None,
        say: Callable[[wire.Message], Awaitable[None]],
    ) -> None:
        self._volume = volume
        self._view = view
        self._forget = forget
        self._say = say
        self._status = [HookStatus(match=hook.match, run=hook.argv) for hook in config.on_change]
        self._changes: Final = Changes(
            config.on_change,
            volume,
            served=self._served,
            watched=not isinstance(view, RamView),
            told=self._tell,
        )
        self._wanted = bool(config.on_change) and not config.once

    @property
    def status(self) -> tuple[HookStatus, ...]:
        """Each hook, and how it went so far."""
        return tuple(self._status)

    def emit(self, event: Event) -> None:
        """EventSink: a set of files that is published is looked at."""
        self._changes.emit(event)

    def look(self) -> None:
        """Something may have changed while nothing was compared."""
        self._changes.look()

    async def take_stock(self) -> None:
        """Whatever changes from now on counts; before the mount is ready."""
        if self._wanted:
            await self._changes.take_stock()

    async def run(self) -> None:
        """Watch until cancelled."""
        if self._wanted:
            await self._changes.run()

    def note(self, report: wire.HookReport) -> None:
        """The launcher tells how a hook went."""
        if 0 <= report.hook < len(self._status):
            self._status[report.hook] = msgspec.structs.replace(
                self._status[report.hook],
                runs=report.runs,
                failures=report.failures,
                problem=report.problem,
            )

    async def _served(self, before: Served) -> Served | None:
        if not isinstance(self._view, RamView):
            return await served_from_source(self._volume, before)
        if self._volume.cache.locked or not self._view.is_published:
            return None
        return {path: (file.source_path, file.version) for path, file in self._view.shown.items()}

    async def _tell(self, changed: frozenset[str], due: dict[int, int]) -> None:
        # First, so that what a hook runs sees the new version.
        if self._forget is not None:
            await self._forget(changed)
        if due:
            await self._say(wire.HooksDue(changed=due))
