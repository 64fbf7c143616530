"""trio for tests that are not coroutines, step by step, on a clock of the test's own."""

import queue
from collections.abc import Awaitable, Callable
from typing import Any

import outcome
import trio
import trio.testing

_STEP_S = 20.0


class GuestTrio:
    """A trio loop that runs only inside `do`, and has come to rest when that returns.

    Its nursery lives until `close`; its clock moves only by `clock.jump` or `advance`.
    """

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self.nursery: trio.Nursery
        self._callbacks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._ended: outcome.Outcome[None] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._callbacks.put,
            done_callback=self._note_end,
            clock=self.clock,
        )
        self._pump(lambda: self._token is not None)

    def do(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Await `call`, then until every task is blocked; returns or raises what it does."""
        result: outcome.Outcome[Any] | None = None

        async def run() -> None:
            nonlocal result
            got = await outcome.acapture(call, *args)
            await trio.testing.wait_all_tasks_blocked()
            result = got

        assert self._token is not None
        self._token.run_sync_soon(self.nursery.start_soon, run)
        self._pump(lambda: result is not None)
        assert result is not None
        return result.unwrap()

    def advance(self, seconds: float) -> None:
        """Let time pass, and everything happen that is due."""

        async def jump() -> None:
            self.clock.jump(seconds)

        self.do(jump)

    def close(self) -> None:
        """Cancel everything, and raise what any task raised."""
        if self._ended is None:
            assert self._token is not None
            self._token.run_sync_soon(self.nursery.cancel_scope.cancel)
        self._pump(lambda: self._ended is not None)
        self._raise_what_ended_it()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            await trio.sleep_forever()

    def _note_end(self, ended: "outcome.Outcome[None]") -> None:
        self._ended = ended

    def _pump(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._ended is not None:
                self._raise_what_ended_it()
                raise AssertionError("trio has ended")
            self._callbacks.get(timeout=_STEP_S)()

    def _raise_what_ended_it(self) -> None:
        if isinstance(self._ended, outcome.Error):
            raise self._ended.error
