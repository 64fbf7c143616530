"""Has the kernel drop what it caches of files in the FUSE view: pages and attributes.

Always from a thread: on the event loop it would deadlock with a read under way.
"""

import errno
import functools
import logging
from collections.abc import Iterable
from typing import Final

import pyfuse3
import trio

from kmsfs.events import Event, Wiped
from kmsfs.views.inodes import InodeTable

# What the kernel and libfuse say when there is no page to drop.
_NOT_CACHED: Final = frozenset(
    {errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ENOTCONN, errno.EINVAL}
)

log = logging.getLogger(__name__)


class KernelPages:
    """What the kernel holds of plaintexts.

    It listens to events: pages of a plaintext that is wiped are dropped by `drop_of_wiped`.
    """

    def __init__(self, inodes: InodeTable) -> None:
        self._inodes = inodes
        self._wiped_paths: set[str] = set()
        self._wiped_event = trio.Event()

    def emit(self, event: Event) -> None:
        """EventSink: note which files' pages the kernel must drop."""
        if isinstance(event, Wiped):
            self._wiped_paths.add(event.path)
            self._wiped_event.set()

    async def drop_of_wiped(self) -> None:
        """Have the kernel drop cached pages of wiped plaintexts, until cancelled."""
        while True:
            await self._wiped_event.wait()
            self._wiped_event = trio.Event()
            paths, self._wiped_paths = self._wiped_paths, set()
            numbers = [number for path in paths for number in self._inodes.numbers_of(path)]
            await trio.to_thread.run_sync(_invalidate, numbers, abandon_on_cancel=True)

    async def drop_all(self, place: str = "") -> None:
        """Have the kernel drop the pages of every file at or below a path that it knows.

        Programs with a live map read them anew, and get SIGBUS if that is refused.
        """
        numbers = self._inodes.files_known(place)
        await trio.to_thread.run_sync(_invalidate, numbers, abandon_on_cancel=True)

    async def forget_changed(self, paths: Iterable[str]) -> None:
        """Have the kernel drop what it believes of files whose ciphertext has changed."""
        numbers = [number for path in paths for number in self._inodes.numbers_of(path)]
        # Of an older version that is open the attributes are right, but no longer the path's.
        older = (inode for number in numbers if (inode := self._inodes.get(number)) and inode.opens)
        names = []
        for directory, _, name in {inode.path.rpartition("/") for inode in older}:
            parent = self._inodes.directory_number(directory)
            if parent is not None:
                names.append((parent, name.encode()))
        await trio.to_thread.run_sync(_invalidate, numbers, names, abandon_on_cancel=True)

    async def forget_attributes(self, number: int) -> None:
        """Have the kernel ask for an inode's attributes again, the size among them."""
        await trio.to_thread.run_sync(
            _call_each,
            [functools.partial(pyfuse3.invalidate_inode, number, attr_only=True)],
            abandon_on_cancel=True,
        )


def _invalidate(numbers: list[int], names: Iterable[tuple[int, bytes]] = ()) -> None:
    calls = [functools.partial(pyfuse3.invalidate_inode, number) for number in numbers]
    calls += [functools.partial(pyfuse3.invalidate_entry, *name) for name in names]
    _call_each(calls)


def _call_each(calls: list[functools.partial[None]]) -> None:
    for call in calls:
        try:
            call()
        except OSError as error:
            # ENOENT: the kernel has forgotten the inode. The others: the mount is gone.
            if error.errno not in _NOT_CACHED:
                log.warning("inode %d was not invalidated: errno %s", call.args[0], error.errno)
