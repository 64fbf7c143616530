"""Decrypts files before anybody opens them, as a volume's configuration asks for."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Final

import trio

from kmsfs.errors import KmsfsError
from kmsfs.settings import MountConfig, path_matches
from kmsfs.store.volume import OpenedFile, Volume
from kmsfs.views.serving import Progress, no_progress

# A prefetch in the background begins at a random moment within this time, so that machines that
# were started together do not ask KMS together; an account's quota is shared by all of them.
MAX_START_S: Final = 5.0


class Prefetch:
    """Decrypts what `prefetch` names; with `require_all`, every file there is.

    What fails is noted like any failed open, and tried again when somebody opens it.

    Args:
        dice: a random number from 0 to below 1.
    """

    def __init__(
        self, config: MountConfig, volume: Volume, *, dice: Callable[[], float] = random.random
    ) -> None:
        self._volume = volume
        self._patterns = config.cache.prefetch
        self._wait = config.wait
        self._require_all = config.require_all
        self._dice = dice

    async def before_ready(self, progress: Progress) -> dict[str, KmsfsError]:
        """Decrypt what has to be there when the mount is ready.

        Returns: with `require_all`, the files that could not be decrypted, with why not.
        Cancellation: leaves files that are being decrypted to others.
        """
        if self._volume.cache.locked:
            # It takes the place of a daemon that was locked, and has to be there to be unlocked.
            return {}
        if self._require_all:
            survey = await self._volume.survey()
            return await open_once(self._volume, [file.path for file in survey.files], progress)
        if self._wait:
            await self._fetch(progress)
        return {}

    async def in_background(self) -> None:
        """Decrypt, after a random pause, what was not decrypted before the mount was ready."""
        if self._wait or self._require_all or not self._patterns:
            return
        await trio.sleep(MAX_START_S * self._dice())
        await self._fetch(no_progress)

    async def _fetch(self, progress: Progress) -> None:
        if self._patterns:
            survey = await self._volume.survey()
            paths = [file.path for file in survey.files if self._is_meant(file.path)]
            await open_once(self._volume, paths, progress)

    def _is_meant(self, path: str) -> bool:
        in_volume = self._volume.path_in_volume(path)
        return any(path_matches(pattern, in_volume) for pattern in self._patterns)


async def open_once(
    volume: Volume, paths: Sequence[str], progress: Progress = no_progress
) -> dict[str, KmsfsError]:
    """Open and close each of some files, so that its plaintext is held.

    Returns: those that could not be opened, with why not.
    Cancellation: leaves files that are being decrypted to others.
    """
    failed: dict[str, KmsfsError] = {}
    done = itertools.count(1)

    async def take(_opened: OpenedFile) -> None:
        return

    def ended(path: str, error: KmsfsError | None) -> None:
        if error is not None:
            failed[path] = error
        progress(next(done), len(paths))

    await volume.open_each(paths, take=take, ended=ended)
    return failed
