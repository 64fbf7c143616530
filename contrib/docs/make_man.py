#!/usr/bin/env python3
"""Writes the manual page kmsfs.1 beside this file from the help texts of the command line."""

import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click

from kmsfs.cli import PROGRAM, cli
from kmsfs.errors import ExitCode

PAGE: Final = Path(__file__).with_name("kmsfs.1")

EXIT_STATUS: Final = {
    ExitCode.DONE: "done",
    ExitCode.SOME_FAILED: "some of several things failed",
    ExitCode.USAGE: "usage or configuration",
    ExitCode.NOT_AUTHENTIC: "not authentic, or of no known format",
    ExitCode.REFUSED_BY_KMS: "refused by KMS",
    ExitCode.KMS_UNAVAILABLE: "KMS or credentials not available",
    ExitCode.GUARANTEE_NOT_MET: "a guarantee cannot be met",
    ExitCode.MOUNTPOINT: "mountpoint",
    ExitCode.BUG: "a bug",
}
"""What `kmsfs` itself exits with, in the words of the README."""

_FILES: Final = {
    "kmsfs.toml": "In the root of a volume: its name, its keys, and the rules it is served under.",
    "/etc/kmsfs/NAME.toml": (
        "What root sets for the volume NAME. It replaces what kmsfs.toml says; with source under "
        "[volume] it makes that directory a volume by itself, and with mountpoint it can be "
        "mounted by its NAME. Its tables [[on_change]] say what is run when files change, and "
        "[audit] where it is recorded who opened what."
    ),
    "/run/kmsfs/ctl, $XDG_RUNTIME_DIR/kmsfs": (
        "Control sockets of the mounts of root, and of other users."
    ),
    "/etc/fuse.conf": "Needs user_allow_other where users other than root give -o allow_other.",
}

_ENVIRONMENT: Final = """\
AWS credentials, profile and region are found as the AWS CLI finds them: AWS_PROFILE,
AWS_REGION, AWS_ENDPOINT_URL_KMS and the others mean the same here."""

_SEE_ALSO: Final = ("aws(1)", "fusermount3(1)", "memfd_secret(2)", "fuse(4)", "mount(8)")


def page() -> str:
    """The manual page, in the man macros of roff."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    made = list(_commands(cli, context))
    yield rf".\" Made by {Path(__file__).name} from the help texts: change those, and run it again."
    yield f'.TH {PROGRAM.upper()} 1 "" "{PROGRAM} {version(PROGRAM)}" "User Commands"'
    yield ".SH NAME"
    summary = _help(cli)[0].rstrip(".")
    yield rf"{PROGRAM} \- {_escaped(summary[0].lower() + summary[1:])}"
    yield ".SH SYNOPSIS"
    yield from _usage(context)
    for _, command_context in made:
        yield ".br"
        yield from _usage(command_context)
    yield ".SH OPTIONS"
    yield from _options(cli, context)
    yield ".SH COMMANDS"
    for command, command_context in made:
        yield f".SS {command_context.command_path.removeprefix(f'{PROGRAM} ')}"
        yield from _usage(command_context)
        for paragraph in _help(command):
            yield ".PP"
            yield _escaped(paragraph)
        yield from _options(command, command_context)
    yield ".SH FILES"
    yield from _definitions(_FILES.items())
    yield ".SH ENVIRONMENT"
    yield _escaped(_ENVIRONMENT)
    yield ".SH SHELL COMPLETION"
    yield _escaped(cli.epilog or "").strip()
    yield ".SH EXIT STATUS"
    yield from _definitions((str(int(code)), text) for code, text in EXIT_STATUS.items())
    yield ".SH SEE ALSO"
    yield ", ".join(rf"\fB{name[:-3]}\fR{name[-3:]}" for name in _SEE_ALSO)


def _commands(
    group: click.Group, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """All commands, those of groups after their group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        command_context = click.Context(command, parent=context, info_name=name)
        yield command, command_context
        if isinstance(command, click.Group):
            yield from _commands(command, command_context)


def _usage(context: click.Context) -> Iterator[str]:
    pieces = " ".join(context.command.collect_usage_pieces(context))
    yield rf"\fB{_escaped(context.command_path)}\fR {_escaped(pieces)}"


def _help(command: click.Command) -> list[str]:
    """Paragraphs, each on one line."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs]


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    # --help is the same everywhere: it is told once, for the program itself.
    told = command.get_help_option(context) if context.parent is not None else None
    for parameter in command.get_params(context):
        if not isinstance(parameter, click.Option) or parameter is told:
            continue
        record = parameter.get_help_record(context)
        if record is not None:
            yield from _definitions([record])


def _definitions(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in items:
        yield ".TP"
        yield rf"\fB{_escaped(term)}\fR"
        yield _escaped(text)


def _escaped(text: str) -> str:
    """Text that roff shows as it is; `-` stays one that can be pasted into a shell."""
    lines = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").splitlines()
    return "\n".join(rf"\&{line}" if line.startswith(".") else line for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
