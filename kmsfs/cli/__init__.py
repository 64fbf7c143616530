"""The command line. One short module per group of commands, imported when it is called."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import click

from kmsfs.cli import messages
from kmsfs.cli.lazy import LazyGroup
from kmsfs.errors import ExitCode, KmsfsError

PROGRAM: Final = "kmsfs"

_COMPLETION_VARIABLE: Final = "_KMSFS_COMPLETE"

_EPILOG: Final = """\
Completion for bash: eval "$(_KMSFS_COMPLETE=bash_source kmsfs)", for zsh and fish with their
names in place of bash.
"""


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"{PROGRAM} {version(PROGRAM)}")
        context.exit()


@click.command(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Mount a directory of files encrypted under AWS KMS and read them as ordinary files."""


def main() -> None:
    """Entry point of `kmsfs`: run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and say on standard error what went wrong.

    Returns:
        The exit status; every exception but SystemExit ends here.
    """
    try:
        if _COMPLETION_VARIABLE in os.environ:
            cli.main(list(arguments), prog_name=PROGRAM, complete_var=_COMPLETION_VARIABLE)
        with cli.make_context(PROGRAM, list(arguments)) as context:
            status = cli.invoke(context)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.exceptions.NoArgsIsHelpError as nothing:
        nothing.show()
        return ExitCode.USAGE
    except click.UsageError as error:
        at = error.ctx.command_path if error.ctx is not None else PROGRAM
        messages.error(error.format_message())
        messages.hint(f"see `{at} --help`")
        return ExitCode.USAGE
    except click.ClickException as error:
        messages.error(error.format_message())
        return ExitCode.USAGE
    except KmsfsError as error:
        messages.failure(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001 - a bug is reported like any other failure
        # The class and the place alone: an exception's text may hold content.
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if f"{os.sep}kmsfs{os.sep}" in frame.filename]
        place = (own or frames)[-1]
        messages.error(f"internal error: {type(error).__name__}")
        messages.hint(
            "this is a bug in kmsfs: please report it with the command, "
            f"{type(error).__name__} and {os.path.basename(place.filename)}:{place.lineno}"
        )
        return ExitCode.BUG
    return int(status) if status is not None else ExitCode.DONE
