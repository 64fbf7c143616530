"""What commands say on standard error: `kmsfs: error: …`, `kmsfs: warning: …`, `kmsfs: hint: …`."""

import click

from kmsfs.errors import KmsfsError


def error(text: str) -> None:
    """Say what failed."""
    _say("error", text)


def warning(text: str) -> None:
    """Say what worked, but should be thought about."""
    _say("warning", text)


def hint(text: str) -> None:
    """Say what to do."""
    _say("hint", text)


def summary(text: str) -> None:
    """Say how a command over many things ended."""
    _say("", text)


def failure(failed: KmsfsError, *, about: str = "") -> None:
    """Say an error and its hint.

    Args:
        about: the file it happened to, if the error's own text does not say.
    """
    error(f"{about}: {failed.detail}" if about else failed.detail)
    if failed.hint:
        hint(failed.hint)


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would not show as itself.

    Names come from files and directories that others may have written.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _say(kind: str, text: str) -> None:
    try:
        click.echo(f"kmsfs: {kind}{': ' if kind else ''}{printable(text)}", err=True)
    except OSError:
        # Standard error is gone or full: the exit status has to do.
        return
