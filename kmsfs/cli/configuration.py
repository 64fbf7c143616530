"""`kmsfs config check` and `kmsfs config show`."""

import json
from typing import TYPE_CHECKING

import click

from kmsfs.cli import messages
from kmsfs.cli.options import json_option
from kmsfs.errors import ExitCode, KmsfsError

if TYPE_CHECKING:
    from kmsfs.manage.configuration import Configuration


@click.group()
def config() -> None:
    """Look at the configuration of volumes."""


@config.command(short_help="Say what is wrong, and what is probably not meant.")
@click.argument("targets", nargs=-1, metavar="[DIR|NAME]...")
def check(targets: tuple[str, ...]) -> ExitCode:
    """Say what is wrong in the configuration of volumes, and what is probably not meant.

    A volume is named by a directory in it, or as NAME of /etc/kmsfs/NAME.toml; without any, all
    that are defined there are looked at. Patterns that match no file are warned of. The status is
    2 if a configuration cannot be honoured, 1 if one of several cannot. KMS is not asked.
    """
    from kmsfs.config_files import SYSTEM_CONFIG_DIR, system_volumes
    from kmsfs.manage.configuration import check as look_for_doubts
    from kmsfs.manage.configuration import configuration_of

    names = targets or sorted({name for name, _ in system_volumes().values()})
    if not names:
        messages.warning(f"{SYSTEM_CONFIG_DIR} defines no volume")
    failures = []
    for name in names:
        try:
            doubts = look_for_doubts(configuration_of(name))
        except KmsfsError as error:
            messages.failure(error, about="" if str(error.detail).startswith("/") else name)
            failures.append(error)
            continue
        for doubt in doubts:
            messages.warning(doubt.text)
            messages.hint(doubt.hint)
        click.echo(messages.printable(f"{name}: {'warnings' if doubts else 'ok'}"))
    if not failures:
        return ExitCode.DONE
    return failures[0].exit_code if len(names) == 1 else ExitCode.SOME_FAILED


@config.command(short_help="Show every value, and where it comes from.")
@click.argument("target", metavar="DIR|NAME")
@json_option
def show(target: str, *, as_json: bool) -> None:
    """Show the configuration of a volume, and which file each value comes from.

    The output is a kmsfs.toml, with the origin of each value in a comment.
    """
    import msgspec

    from kmsfs.manage.configuration import configuration_of, settings_in

    configuration = configuration_of(target)
    if as_json:
        record = {
            "volume": configuration.name,
            "root": str(configuration.root),
            "files": [str(file.path) for file in configuration.files],
            "settings": [
                {name: getattr(setting, name) for name in setting.__slots__}
                for setting in settings_in(configuration)
            ],
        }
        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
    else:
        click.echo(_as_toml(configuration), nl=False)


def _as_toml(configuration: "Configuration") -> str:
    from kmsfs.manage.configuration import settings_in

    files = ", ".join(str(file.path) for file in configuration.files)
    lines = [f"# volume {configuration.name} at {configuration.root}, from {files}"]
    table = ("", -1)
    for setting in settings_in(configuration):
        is_array = isinstance(getattr(configuration.record, setting.table), tuple)
        if table != (setting.table, setting.number):
            table = setting.table, setting.number
            head = f"[[{setting.table}]]" if is_array else f"[{setting.table}]"
            lines += ["", head]
        if setting.value is None:
            lines.append(f"# {setting.key} is not set")
            continue
        lines.append(f"{setting.key} = {_inline(setting.value)}  # {setting.origin}")
    return "".join(messages.printable(line) + "\n" for line in lines)


def _inline(value: object) -> str:
    """A value in one line of TOML, whose strings JSON's are too."""
    match value:
        case tuple():
            return f"[{', '.join(map(_inline, value))}]"
        case dict():
            pairs = (f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items())
            return f"{{ {', '.join(pairs)} }}" if value else "{}"
        case _:
            return json.dumps(value, ensure_ascii=False)
