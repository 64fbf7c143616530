"""Which changes of served files are told, and whom they concern."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from kmsfs.events import Published
from kmsfs.settings import OnChange
from kmsfs.store.changes import Changes, Served

pytestmark = pytest.mark.trio

HOOKS = tuple(OnChange(match=match, argv=("x",)) for match in ("volume/web/*", "**", "other/*"))


def version(number: int) -> tuple[int, int, int, int, int]:
    return (1, number, 3, 4, 5)


class _Volume:
    """The part of a volume that a set of published files is compared with."""

    source = None

    def path_in_volume(self, path: str) -> str:
        return f"volume/{path}"


class Watched:
    """Changes under test, what is served, and what was told."""

    def __init__(self) -> None:
        self.served: Served | None = {"web/a": ("web/a.kms", version(1))}
        self.told: list[tuple[set[str], dict[int, int]]] = []
        volume = _Volume()
        self.changes = Changes(
            HOOKS,
            volume,  # type: ignore[arg-type] # the part that is asked
            served=self._served,
            watched=False,
            told=self._tell,
        )

    async def _served(self, before: Served) -> Served | None:
        return self.served

    async def _tell(self, changed: frozenset[str], due: dict[int, int]) -> None:
        self.told.append((set(changed), due))

    async def look(self, served: Served | None) -> list[tuple[set[str], dict[int, int]]]:
        """Serve other files and look at them; returns what was told."""
        self.served, self.told = served, []
        self.changes.emit(Published(files=0, size_bytes=0, added=0, changed=0, removed=0, failed=0))
        # Until it has looked twice.
        await trio.sleep(2)
        return self.told


@pytest.fixture
async def watched(nursery: trio.Nursery) -> AsyncIterator[Watched]:
    """Every test takes the clock itself: pytest-trio looks no further for it."""
    made = Watched()
    await made.changes.take_stock()
    nursery.start_soon(made.changes.run)
    yield made
    nursery.cancel_scope.cancel()


async def test_added_replaced_and_removed_files_are_told_to_whom_they_concern(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    a = ("web/a.kms", version(1))
    both: Served = {"web/a": a, "db/b": ("db/b.kms", version(2))}
    assert await watched.look(both) == [({"db/b"}, {1: 1})]
    replaced: Served = {"web/a": ("web/a.kms", version(3)), "db/b": ("db/b.kms", version(4))}
    assert await watched.look(replaced) == [({"web/a", "db/b"}, {0: 1, 1: 2})]
    assert await watched.look({}) == [({"web/a", "db/b"}, {0: 1, 1: 2})]


async def test_what_is_as_it_was_is_not_told(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    assert await watched.look(watched.served) == []


async def test_another_ciphertext_for_one_name_is_a_change(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    served: Served = {"web/a": ("web/a.encrypted", version(1))}
    assert await watched.look(served) == [({"web/a"}, {0: 1, 1: 1})]


async def test_while_nothing_is_to_be_compared_changes_are_kept_for_later(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    assert await watched.look(None) == []
    assert await watched.look({"web/a": ("web/a.kms", version(2))}) == [({"web/a"}, {0: 1, 1: 1})]


async def test_nothing_is_a_change_before_stock_was_taken(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    made = Watched()
    nursery.start_soon(made.changes.run)
    assert await made.look({}) == []
    nursery.cancel_scope.cancel()
