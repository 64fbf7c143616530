"""The ramfs view: the volume's files, all of them, copied into a real ramfs.

It keeps the copy in step with the source: a new set of files is filled aside and published in
one step. What lies where is `ram_tree`'s matter, what is shown `ram_plan`'s, how it gets there
`ram_fill`'s; this one keeps time.
"""

import math
import os
from typing import Final

import trio

from kmsfs.errors import KmsfsError, MountFailed
from kmsfs.events import EventSink, NotShown, Published, PublishHeldBack
from kmsfs.settings import MountConfig
from kmsfs.store import watch
from kmsfs.store.history import boot_clock_s
from kmsfs.store.names import is_at_or_below
from kmsfs.store.volume import Volume
from kmsfs.views import mountpoint as mounts
from kmsfs.views import ram_mount, ram_plan, ram_state
from kmsfs.views.ram_fill import Filling
from kmsfs.views.ram_plan import NextSet, Outcome, RamFile, Trouble
from kmsfs.views.ram_tree import OPENING_S, RamTree
from kmsfs.views.serving import HeldFile, Progress, Ready, no_progress

# A program that has found its way to the set before may open another file of it for so long.
_LINGER_S: Final = 1.0

# How often an old file is tried that somebody holds, at first and at last.
_FIRST_WIPE_RETRY_S: Final = 0.25
_MAX_WIPE_RETRY_S: Final = 5.0

# Looked at once more so long after a change: one that came while a new directory was being
# added to the watch may have been missed.
_SETTLE_S: Final = 1.0

# Made in a row while the source changes under them; the next refresh tries again.
_MAX_ATTEMPTS: Final = 5

# Before what is overdue is tried again.
_OVERDUE_PAUSE_S: Final = 1.0


class RamView:
    """Fills one ramfs and keeps it in step with the source.

    Args:
        mount_fd: a writable descriptor of the ramfs's root; the view's from now on.

    Attributes:
        shown: the files that programs see, by path.
        stale: those of them that KMS could not be asked for again, with why not.
        missing: files of the source that are not shown, with why not.
        held: old files that cannot be wiped yet.
        problem: why the last refresh was not made; empty otherwise.
        is_published: whether programs see a set of files, be it of none.

    Raises:
        MountpointUnusable: see `RamTree`.
        GuaranteeNotMet: see `ram_mount.verify`.
    """

    def __init__(
        self, config: MountConfig, volume: Volume, events: EventSink, mount_fd: int
    ) -> None:
        self._config = config
        self._volume = volume
        self._events = events
        self._mount_fd = mount_fd
        ram_mount.verify(mount_fd, config.mountpoint, config.ram)
        self._tree = RamTree(mount_fd)
        self._visible = True
        self.is_published = False
        self._directories: tuple[str, ...] = ()
        self._troubles: dict[str, Trouble] = {}
        self._held_back: frozenset[str] = frozenset()
        self._busy = trio.Lock()
        self._wake = trio.Event()
        self._stopped = trio.Event()
        # Moments on trio's clock.
        self._refresh_at = self._retire_at = self._wipe_at = math.inf
        self._wipe_retry_s = _FIRST_WIPE_RETRY_S
        self.shown: dict[str, RamFile] = {}
        self.stale: dict[str, KmsfsError] = {}
        self.missing: dict[str, KmsfsError] = {}
        self.held: tuple[HeldFile, ...] = ()
        self.problem = ""

    @property
    def size_bytes(self) -> int:
        """What the files shown take of memory."""
        return ram_plan.memory_of(self.shown)

    @property
    def is_swappable(self) -> bool:
        """Whether the kernel may write the files to swap."""
        return ram_mount.is_swappable(self._mount_fd)

    # --- what the composition root calls -------------------------------------------------------

    async def serve(self, ready: Ready, progress: Progress) -> None:
        """Fill, and keep in step until `stop` is called; with `once`, fill only."""
        missing = await self._fill(progress)
        try:
            await ready(missing)
        except KmsfsError:
            await self.empty()
            raise
        if self._config.once:
            await self._wipe_older()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_in_step)
            await self._stopped.wait()
            nursery.cancel_scope.cancel()

    async def after_lock(self) -> tuple[HeldFile, ...]:
        """Take every file away, and wipe those that nobody holds."""
        return await self.empty()

    async def after_unlock(self) -> dict[str, KmsfsError]:
        """Fill the ramfs again.

        Cancellation: it is filled all the same.
        """
        self._source_changed()
        return await self.refresh()

    async def reread(self, place: str, *, accept_older: bool) -> dict[str, KmsfsError]:
        """See `View.reread`: everything there is decrypted now."""
        versions = self._volume.versions
        self._volume.cache.retire(place)
        with versions.accepting_older(versions.below(place) if accept_older else ()):
            await self.refresh(again=place)
        unread = {**self.stale, **self.missing}
        return {path: error for path, error in unread.items() if is_at_or_below(path, place)}

    async def detach(self) -> None:
        """Unmounted: nobody new can see the files, so they are taken away, and that is all."""
        self._visible = False
        await self.empty()

    def stop(self) -> None:
        """Have `serve` return; the files stay as they are."""
        self._stopped.set()

    def close(self) -> None:
        """Let another process fill the ramfs; the files stay as they are."""
        self._tree.close()
        os.close(self._mount_fd)

    # --- in step with the source ---------------------------------------------------------------

    async def _fill(self, progress: Progress) -> dict[str, KmsfsError]:
        """Take over what a killed process left, then refresh.

        Returns, Raises: see `refresh`.
        """
        await trio.to_thread.run_sync(self._take_over)
        self._wipe_soon()
        return await self.refresh(progress)

    async def _keep_in_step(self) -> None:
        """Follow the source, ask again when a file's time is over, wipe old files.

        Until cancelled.
        """
        self._refresh_at = trio.current_time() + _SETTLE_S
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_source)
            while True:
                wake = self._wake
                with trio.move_on_at(min(self._refresh_at, self._retire_at, self._wipe_at)):
                    await wake.wait()
                await self._do_what_is_due(trio.current_time())

    async def refresh(
        self, progress: Progress = no_progress, *, again: str | None = None
    ) -> dict[str, KmsfsError]:
        """Bring the ramfs in step with the source now; not while locked or unmounted.

        Args:
            again: a path; files at or below it are asked for whatever is known of them.

        Returns: the files that are not there, with why not.
        Raises:
            GuaranteeNotMet: the filesystem is not what it must be.
            MountFailed: it cannot be written.
        Cancellation: the set shown stays.
        """
        async with self._busy:
            for attempt in range(_MAX_ATTEMPTS):
                if not self._may_fill():
                    return {}
                ram_mount.verify(self._mount_fd, self._config.mountpoint, self._config.ram)
                ram_mount.verify_visible(self._mount_fd, self._config.mountpoint)
                last = attempt == _MAX_ATTEMPTS - 1
                if await self._fill_once(progress, last=last, again=again):
                    return self.missing
        return self.missing

    async def _fill_once(self, progress: Progress, *, last: bool, again: str | None) -> bool:
        """Decrypt and publish one set; False if the source changed meanwhile.

        A set that nobody ever put there (a certificate from before a change, its key from after
        it) is not published, even if it is the `last` attempt, but for the first of all.
        """
        cache = self._config.cache
        survey = await self._volume.survey()
        decided = ram_plan.plan(
            survey, self.shown, self._troubles, cache, boot_clock_s(), again=again
        )
        filling = Filling(self._volume, self._tree, cache, decided, self.shown)
        try:
            outcomes = await filling.decrypt(progress)
            if not self._may_fill():
                return True
            self._note_troubles(filling, outcomes, {file.path for file in survey.files})
            for path, error in decided.known.items():
                self._volume.history.note_known(path, error)
            following = ram_plan.settle(
                survey,
                decided,
                outcomes,
                self.shown,
                self._held_back,
                cache=cache,
                now=boot_clock_s(),
            )
            if not self._shows(following):
                moved = not ram_plan.is_same_source(survey, await self._volume.survey())
                if moved and (self.is_published or not last):
                    if last:
                        self._note_problem("the source keeps changing")
                    return False
                await self._publish(filling, following)
            self.shown, self._directories = following.files, following.directories
            self._tell_missing(following)
            self._held_back = following.held_back
            self.stale, self.missing, self.problem = following.stale, following.failed, ""
            return True
        except OSError as error:
            raise MountFailed(f"filling the ramfs: {error.strerror}") from error
        finally:
            if await filling.discard():
                self._wipe_soon()

    def _may_fill(self) -> bool:
        return self._visible and not self._volume.cache.locked

    async def _watch_source(self) -> None:
        source = self._volume.source
        await watch.follow(source.root, has_inotify=source.is_local, changed=self._source_changed)

    def _source_changed(self) -> None:
        self._refresh_at = 0.0
        self._wake_up()

    async def _do_what_is_due(self, now: float) -> None:
        if self._retire_at <= now:
            self._retire_at = math.inf
            async with self._busy:
                await trio.to_thread.run_sync(self._tree.retire)
            self._wipe_soon()
        if self._wipe_at <= now:
            await self._wipe_old()
        if self._refresh_at <= now:
            changed = self._refresh_at == 0.0
            self._refresh_at = trio.current_time() + _SETTLE_S if changed else math.inf
            try:
                await self.refresh()
            except KmsfsError as error:
                self._note_problem(error.detail)
            due_s = ram_plan.next_due_s(self.shown, self._troubles, self._config.cache)
            pause_s = due_s - boot_clock_s()
            if pause_s <= 0:
                # What could not be done just now.
                pause_s = _OVERDUE_PAUSE_S
            self._refresh_at = min(self._refresh_at, trio.current_time() + pause_s)

    def _note_problem(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self._events.emit(PublishHeldBack(problem))

    def _note_troubles(
        self, filling: Filling, outcomes: dict[str, Outcome], in_source: set[str]
    ) -> None:
        now = boot_clock_s()
        for path, outcome in outcomes.items():
            before = self._troubles.pop(path, None)
            if isinstance(outcome, KmsfsError):
                file = filling.asked[path]
                self._troubles[path] = Trouble.after(before, file, outcome, now)
        for path in self._troubles.keys() - in_source:
            del self._troubles[path]

    def _tell_missing(self, following: NextSet) -> None:
        """What failed for the same reason before was told then."""
        for path, error in following.failed.items():
            before = self.missing.get(path)
            if before is None or before.code != error.code:
                self._events.emit(NotShown(path, error.code, error.detail))

    def _shows(self, following: NextSet) -> bool:
        """Whether these are the files that programs see already."""
        return (
            self.is_published
            and not following.fresh
            and following.files.keys() == self.shown.keys()
            and following.directories == self._directories
        )

    async def _publish(self, filling: Filling, following: NextSet) -> None:
        was = self.shown
        state = ram_state.encode(
            self._config,
            following.files,
            following.directories,
            self._volume.versions.known(),
        )
        await filling.publish(following, state)
        self.is_published = True
        self._retire_at = trio.current_time() + _LINGER_S
        self._wake_up()
        self._events.emit(
            Published(
                files=len(following.files),
                size_bytes=ram_plan.memory_of(following.files),
                added=len(following.files.keys() - was.keys()),
                changed=len(following.fresh & was.keys()),
                removed=len(was.keys() - following.files.keys()),
                failed=len(following.failed),
            )
        )

    # --- taking over ---------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Keep a killed process's files, if this one would make the same and it was not locked.

        Only on a mount of ours: into any other, somebody else could have put them.
        """
        mount = mounts.find_mount(self._config.mountpoint)
        if mount is not None and mounts.is_ours(mount) and not self._volume.cache.locked:
            left = ram_state.read(self._tree, self._config)
            if left is not None:
                self.shown, self._directories = left.files, left.directories
                self._volume.versions.restore(left.versions)
                self.is_published = True
        take_away = self._tree.empty if self._volume.cache.locked else self._tree.retire
        take_away()

    # --- taking away ---------------------------------------------------------------------------

    async def empty(self) -> tuple[HeldFile, ...]:
        """Take every file away, and wipe those that nobody holds.

        Returns: those that somebody does.
        """
        async with self._busy:
            await trio.to_thread.run_sync(self._tree.empty)
            self.shown, self._directories, self.stale = {}, (), {}
            self._troubles.clear()
            self.is_published = False
            self._retire_at = math.inf
        # Whoever was just opening a file has it then, or has no file.
        await trio.sleep(OPENING_S)
        await self._wipe_old()
        return self.held

    async def _wipe_older(self) -> None:
        """Take away the set that was taken over, with nobody staying to do it later."""
        if self._tree.has_older():
            await trio.sleep(_LINGER_S)
            await trio.to_thread.run_sync(self._tree.retire)
            await trio.sleep(OPENING_S)
            await self._wipe_old()

    def _wipe_soon(self) -> None:
        self._wipe_at = trio.current_time() + OPENING_S
        self._wipe_retry_s = _FIRST_WIPE_RETRY_S
        self._wake_up()

    async def _wipe_old(self) -> None:
        async with self._busy:
            self.held = tuple(await trio.to_thread.run_sync(self._tree.wipe_old))
        self._wipe_at = math.inf
        if self.held:
            self._wipe_at = trio.current_time() + self._wipe_retry_s
            self._wipe_retry_s = min(2 * self._wipe_retry_s, _MAX_WIPE_RETRY_S)
        elif not self._visible:
            # There is nothing left to do, and nobody left to do it for.
            self.stop()

    def _wake_up(self) -> None:
        self._wake.set()
        self._wake = trio.Event()
