"""What is decrypted before anybody opens it, and when."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import CiphertextInvalid
from kmsfs.memory.arena import Arena
from kmsfs.settings import CacheSettings, MountConfig, Ownership
from kmsfs.views.prefetch import MAX_START_S, Prefetch
from kmsfs.views.serving import no_progress
from tests.support.events import Recorder
from tests.support.scripted_volume import Ciphertext, ScriptedSource, scripted_volume
from tests.support.secret_memory import adopt

pytestmark = pytest.mark.trio

NAMES = ("a.pem", "b.txt", "bad.pem")


class Site:
    """A volume whose directory `in` is served, and a prefetch with the dice at one half."""

    def __init__(self, config: MountConfig) -> None:
        self.decrypted: list[str] = []
        self.arena = Arena(1 << 20)
        self.source = ScriptedSource(
            {name: Ciphertext(name) for name in NAMES}, lambda _: None, lambda _: None
        )
        self.volume = scripted_volume(
            self.source, self._decrypt, arena=self.arena, events=Recorder(), config=config
        )
        self.prefetch = Prefetch(config, self.volume, dice=lambda: 0.5)

    async def _decrypt(self, wanted: Ciphertext, _deadline: float) -> Plaintext:
        self.decrypted.append(wanted.path)
        if wanted.path == "bad.pem":
            raise CiphertextInvalid("as the test wants it")
        return Plaintext(adopt(self.arena, b"x"), "arn:key", "test")


Open = Callable[..., AbstractAsyncContextManager[Site]]


@pytest.fixture
def site(autojump_clock: trio.testing.MockClock) -> Open:
    """Opens a `Site`. Every test takes the clock itself: pytest-trio looks no further for it."""

    @asynccontextmanager
    async def open_site(*patterns: str, **changes: object) -> AsyncIterator[Site]:
        config = MountConfig(
            source="/v/in",
            mountpoint="/m",
            volume_root="/v",
            ownership=Ownership(uid=0, gid=0),
            cache=CacheSettings(prefetch=patterns, ttl_s=0.0, idle_s=1e9),
        )
        made = Site(msgspec.structs.replace(config, **changes))
        async with trio.open_nursery() as nursery:
            await nursery.start(made.volume.cache.run)
            yield made
            nursery.cancel_scope.cancel()

    return open_site


async def test_in_the_background_it_comes_after_a_random_pause(
    site: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with site("in/*.pem") as s:
        started = trio.current_time()
        assert await s.prefetch.before_ready(no_progress) == {}
        assert (s.decrypted, trio.current_time()) == ([], started)
        await s.prefetch.in_background()
        assert trio.current_time() >= started + 0.5 * MAX_START_S
        assert sorted(s.decrypted) == ["a.pem", "bad.pem"]


async def test_patterns_speak_of_paths_in_the_volume(
    site: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with site("a.pem", "in/b.*") as s:
        await s.prefetch.in_background()
        assert s.decrypted == ["b.txt"]


async def test_what_was_waited_for_is_not_fetched_again(
    site: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with site("in/*.pem", wait=True) as s:
        done: list[tuple[int, int]] = []
        assert await s.prefetch.before_ready(lambda *progress: done.append(progress)) == {}
        assert done == [(1, 2), (2, 2)]
        await s.prefetch.in_background()
        assert sorted(s.decrypted) == ["a.pem", "bad.pem"]
        assert s.source.surveys == 1


async def test_where_all_are_required_all_are_fetched_and_those_that_fail_are_named(
    site: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with site("in/a.pem", require_all=True) as s:
        done: list[tuple[int, int]] = []
        failed = await s.prefetch.before_ready(lambda *progress: done.append(progress))
        assert {path: type(error) for path, error in failed.items()} == {
            "bad.pem": CiphertextInvalid
        }
        assert done == [(1, 3), (2, 3), (3, 3)]
        await s.prefetch.in_background()
        assert sorted(s.decrypted) == sorted(NAMES)


async def test_without_patterns_nothing_is_fetched(
    site: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with site() as s:
        assert await s.prefetch.before_ready(no_progress) == {}
        await s.prefetch.in_background()
        assert (s.decrypted, s.source.surveys) == ([], 0)
