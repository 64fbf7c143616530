"""How a command over many files shows where it is, what fails, and how it ended."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode

if TYPE_CHECKING:
    from kmsfs.manage.gate import Gate
    from kmsfs.manage.pool import Outcome, Work

Advance = Callable[[], None]


class Tally:
    """What became of the files so far.

    Args:
        done_word: what was done with them, as in "3 files encrypted".
    """

    def __init__(self, done_word: str) -> None:
        self._done_word = done_word
        self._skipped: Counter[str] = Counter()
        self.done = 0
        self.failed: list[ExitCode] = []

    def add(self, name: str, outcome: "Outcome") -> None:
        """Say how it went with one file: its output, what failed, what to think about."""
        match outcome.state:
            case "done":
                self.done += 1
                click.echo(messages.printable(outcome.output))
            case "skipped":
                self._skipped[outcome.detail] += 1
            case "failed":
                error = from_code(outcome.code, outcome.detail, outcome.hint)
                messages.failure(error, about=name)
                self.failed.append(error.exit_code)
        for warning, hint in outcome.warnings:
            messages.warning(f"{outcome.output or name}: {warning}")
            messages.hint(hint)

    @property
    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"{_files(self.done)} {self._done_word}"]
        if self._skipped:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in sorted(self._skipped.items())
            )
            parts.append(f"{self._skipped.total()} skipped ({reasons})")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        return ", ".join(parts)

    def status(self, count: int) -> ExitCode:
        """What the command ends with, `count` files having been named or found."""
        if not self.failed:
            return ExitCode.DONE
        return self.failed[0] if count == 1 else ExitCode.SOME_FAILED


def work_on(
    names: Sequence[str],
    start: "Callable[[Gate], Work]",
    *,
    doing: str,
    done_word: str,
    passed_over: Sequence[tuple[str, str]] = (),
    again: str = "the same command goes on where this one stopped",
    quiet: bool = False,
) -> Tally:
    """Have files worked on by worker processes, and say how it goes.

    Args:
        doing: what the progress bar says.
        passed_over: path and kind of what is not worked on, to be named.
        again: what to do after the command was interrupted.
        quiet: no summary at the end: for one file.
    """
    from kmsfs.manage import pool

    for path, kind in passed_over:
        messages.warning(f"{path} is {kind}, and not followed")
    tally = Tally(done_word)
    try:
        with (
            _progress(doing, len(names)) as advance,
            contextlib.closing(pool.run(len(names), start)) as outcomes,
        ):
            for number, outcome in outcomes:
                tally.add(names[number], outcome)
                advance()
    except (KeyboardInterrupt, SystemExit):
        messages.summary(f"interrupted: {tally.summary}")
        messages.hint(again)
        raise
    if not quiet:
        messages.summary(tally.summary)
    return tally


@contextlib.contextmanager
def _progress(doing: str, total: int) -> Iterator[Advance]:
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    # Without a thread of its own: this process forks.
    bar = Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task(doing, total=total)
        shown = 0

        def advance() -> None:
            nonlocal shown
            bar.advance(task)
            percent = 100 * int(bar.tasks[0].completed) // max(total, 1)
            if percent != shown:
                shown = percent
                bar.refresh()

        yield advance


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
