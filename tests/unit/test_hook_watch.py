"""The daemon's part of on-change hooks: what it does about a change, and in which order."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from kmsfs.daemon.hooks import HookWatch
from kmsfs.decryptor import wire
from kmsfs.decryptor.client import Plaintext
from kmsfs.memory.arena import Arena
from kmsfs.settings import MountConfig, OnChange, Ownership
from kmsfs.store import changes
from kmsfs.views.serving import View
from tests.support.events import Recorder
from tests.support.eventually import eventually
from tests.support.scripted_volume import Ciphertext, ScriptedSource, scripted_volume

pytestmark = pytest.mark.trio


async def never(_wanted: Ciphertext, _deadline: float) -> Plaintext:
    """Nothing here asks KMS."""
    raise AssertionError


class Watched:
    """A watch over one file, `a`, with hooks for it and for others, in a view like FUSE."""

    def __init__(self, root: Path, *, once: bool = False) -> None:
        self.done: list[object] = []
        config = MountConfig(
            source=str(root),
            mountpoint="/m",
            volume_root=str(root),
            ownership=Ownership(uid=0, gid=0),
            once=once,
            on_change=(OnChange(match="b", argv=("x",)), OnChange(match="a", argv=("x",))),
        )
        self.source = ScriptedSource(
            {"a": Ciphertext("a")}, lambda _: None, lambda _: None, root=str(root)
        )
        self.volume = scripted_volume(
            self.source, never, arena=Arena(1 << 20), events=Recorder(), config=config
        )
        view = cast(View, None)
        self.watch = HookWatch(config, self.volume, view, forget=self._forget, say=self._say)

    async def _forget(self, paths: frozenset[str]) -> None:
        self.done.append(("forget", set(paths)))

    async def _say(self, message: wire.Message) -> None:
        self.done.append(message)

    async def look(self) -> list[object]:
        """Have it look; returns what it does."""
        self.done.clear()
        self.watch.look()
        surveys = self.source.surveys
        await trio.testing.wait_all_tasks_blocked()
        if not self.volume.cache.locked:
            # With the second look all is said that came of the first.
            await eventually(lambda: self.source.surveys >= surveys + 2)
        return self.done


@pytest.fixture
async def watched(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Watched]:
    """With stock taken, and running."""
    monkeypatch.setattr(changes, "_SETTLE_S", 0.05)
    made = Watched(tmp_path)
    await made.watch.take_stock()
    nursery.start_soon(made.watch.run)
    yield made
    nursery.cancel_scope.cancel()


async def test_the_kernel_forgets_before_a_hook_is_run(watched: Watched) -> None:
    watched.source.files["a"] = Ciphertext("a", 2)
    assert await watched.look() == [("forget", {"a"}), wire.HooksDue(changed={1: 1})]


async def test_what_concerns_no_hook_is_forgotten_all_the_same(watched: Watched) -> None:
    watched.source.files["c"] = Ciphertext("c")
    assert await watched.look() == [("forget", {"c"})]


async def test_nothing_is_compared_while_locked_and_all_of_it_after(watched: Watched) -> None:
    watched.volume.cache.locked = True
    watched.source.files["a"] = Ciphertext("a", 2)
    assert await watched.look() == []
    watched.volume.cache.unlock()
    assert await watched.look() == [("forget", {"a"}), wire.HooksDue(changed={1: 1})]


async def test_a_mount_that_is_filled_once_watches_nothing(tmp_path: Path) -> None:
    made = Watched(tmp_path, once=True)
    with trio.fail_after(10):
        await made.watch.take_stock()
        await made.watch.run()
    assert made.source.surveys == 0


async def test_a_report_of_the_launcher_is_the_status_of_its_hook(watched: Watched) -> None:
    for number in (1, 2, -1):
        watched.watch.note(wire.HookReport(hook=number, runs=3, failures=1, problem="no"))
    first, second = watched.watch.status
    assert (first.runs, first.problem) == (0, "")
    assert (second.runs, second.failures, second.problem) == (3, 1, "no")
