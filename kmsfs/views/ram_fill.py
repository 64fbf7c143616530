"""One set of files for the ramfs in the making: decrypted into a generation, published or not."""

import os
from typing import Final

import trio

from kmsfs.errors import KmsfsError, MountFailed
from kmsfs.memory.mapping import round_to_pages
from kmsfs.settings import CacheSettings
from kmsfs.store.history import boot_clock_s
from kmsfs.store.source import SourceFile
from kmsfs.store.volume import OpenedFile, Volume
from kmsfs.views import ram_plan
from kmsfs.views.ram_plan import NextSet, Outcome, Plan, RamFile
from kmsfs.views.ram_tree import Generation, RamTree
from kmsfs.views.serving import Progress

# Written at a time: a large file must not hold up the event loop.
_CHUNK_BYTES: Final = 1 << 20


class Filling:
    """Decrypts the files of a plan and writes those that are new or changed.

    Args:
        shown: what the ramfs shows now.
    """

    def __init__(
        self,
        volume: Volume,
        tree: RamTree,
        cache: CacheSettings,
        decided: Plan,
        shown: dict[str, RamFile],
    ) -> None:
        self._volume = volume
        self._tree = tree
        self._cache = cache
        self._shown = shown
        self._generation: Generation | None = None
        self._written: set[str] = set()
        self._total_bytes = sum(round_to_pages(file.size_bytes) for file in decided.keep.values())
        self.asked: Final[dict[str, SourceFile]] = {file.path: file for file in decided.ask}

    async def decrypt(self, progress: Progress) -> dict[str, Outcome]:
        """Ask for every file of the plan.

        Returns: what became of each.
        Raises:
            OSError: the ramfs refuses a new generation.
        Cancellation: what was written so far is `discard`'s matter.
        Plaintext: from the slot into a file that nobody else may open yet.
        """
        outcomes: dict[str, Outcome] = {}

        async def take(opened: OpenedFile) -> None:
            outcomes[opened.file.path] = await self._take(opened)

        def ended(path: str, error: KmsfsError | None) -> None:
            if error is not None:
                outcomes[path] = error
            progress(len(outcomes), len(self.asked))

        await self._volume.open_each(self.asked, take=take, ended=ended)
        return outcomes

    async def publish(self, following: NextSet, state: bytes) -> None:
        """Make this the set that programs see.

        Raises:
            OSError: the ramfs refuses; what was there before stays.
        Cancellation: seen to its end first.
        """
        generation = self._begun()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._publish, generation, following, state)
        self._generation = None
        generation.close()

    async def discard(self) -> bool:
        """Take away what was written and not published; whether there was any."""
        generation, self._generation = self._generation, None
        if generation is None:
            return False
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._tree.discard, generation)
        return True

    async def _take(self, opened: OpenedFile) -> RamFile:
        file, size_bytes = opened.file, opened.lease.size_bytes
        needed_bytes = round_to_pages(size_bytes)
        if self._total_bytes + needed_bytes > self._cache.max_bytes:
            error = ram_plan.limit_reached(self._total_bytes, size_bytes, self._cache)
            self._volume.history.note_failure(file.path, error)
            raise error
        self._total_bytes += needed_bytes
        old = self._shown.get(file.path)
        if old is None or not old.is_of(file):
            try:
                await self._write(opened)
            except OSError as error:
                raise MountFailed(f"writing {file.path} to the ramfs: {error.strerror}") from error
        return RamFile(
            source_path=file.source_path,
            version=file.version,
            size_bytes=size_bytes,
            decrypted_at_s=boot_clock_s(),
        )

    async def _write(self, opened: OpenedFile) -> None:
        generation = self._begun()
        path = opened.file.path
        permissions = self._volume.policy.of_file(path)
        fd = generation.create(path, permissions)
        try:
            offset = 0
            while offset < opened.lease.size_bytes:
                offset += opened.lease.write_to(fd, offset, _CHUNK_BYTES)
                await trio.lowlevel.checkpoint()
            generation.finish(fd, permissions, opened.file.version[3])
        except BaseException:
            os.close(fd)
            generation.take_out(path)
            raise
        os.close(fd)
        self._written.add(path)

    def _begun(self) -> Generation:
        if self._generation is None:
            self._generation = self._tree.begin()
        return self._generation

    def _publish(self, generation: Generation, following: NextSet, state: bytes) -> None:
        """In a thread: a set may have thousands of files."""
        current_fd = self._tree.open_current()
        try:
            for path in following.directories:
                generation.make_directory(path)
            for path in following.files.keys() - following.fresh:
                assert current_fd is not None, "there is nothing to link from"
                if path in self._written:
                    # A new version that is held back for another's sake.
                    generation.take_out(path)
                generation.link(path, current_fd)
        finally:
            if current_fd is not None:
                os.close(current_fd)
        self._tree.publish(generation, self._volume.policy.of_directory(), state)
