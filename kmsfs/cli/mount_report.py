"""What `kmsfs mount` says while a mount comes along: warnings, failures, a progress bar."""

import sys
from typing import TYPE_CHECKING, Self

from kmsfs.cli import messages
from kmsfs.decryptor import wire
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class MountReport:
    """Says what it is told on standard error; the bar shows on a terminal only."""

    def __init__(self) -> None:
        self._missing = 0
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    @property
    def status(self) -> ExitCode:
        """What the command ends with, if it mounted."""
        return ExitCode.SOME_FAILED if self._missing else ExitCode.DONE

    def tell(self, told: wire.Told) -> None:
        """Say it."""
        match told:
            case wire.ViewChosen():
                messages.warning(
                    f"FUSE cannot be used ({told.reason}): the files are copied into a ramfs"
                )
                messages.hint(
                    "every file is decrypted now and at each change, not when it is opened; "
                    "--view ramfs asks for this, --view fuse refuses it"
                )
            case wire.Filling():
                self._show_progress(told.done, told.total)
            case wire.PromiseWeak():
                self._end_bar()
                messages.error(f"{told.grade}: {told.promise}: {told.evidence}")
                if told.todo:
                    messages.hint(told.todo)
            case wire.FileMissing():
                self._end_bar()
                self._missing += 1
                messages.failure(from_code(told.code, told.detail, told.hint), about=told.path)

    def _show_progress(self, done: int, total: int) -> None:
        if not sys.stderr or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.start()
            self._bar = bar, bar.add_task("decrypting", total=total)
        bar, task = self._bar
        bar.update(task, completed=done, total=total)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
