"""Which command lives where, imported only when it is called: `mount` has to start fast."""

import importlib
from dataclasses import dataclass
from typing import Final

import click


@dataclass(frozen=True, slots=True)
class _Entry:
    """A command's module under kmsfs.cli, in which it is an attribute of its own name."""

    module: str
    summary: str


# In the order of the help text: first things first.
_COMMANDS: Final = {
    "init": _Entry("volume", "Make a directory a volume."),
    "encrypt": _Entry("files", "Encrypt files."),
    "decrypt": _Entry("files", "Decrypt a file, or a tree into memory."),
    "edit": _Entry("edit", "Edit the plaintext of one file in a private ramfs."),
    "reencrypt": _Entry("rotation", "Encrypt files anew: new key, or its newest material."),
    "migrate": _Entry("rotation", "Bind the unbound files of a volume to their places."),
    "mv": _Entry("transfer", "Move ciphertext, and bind it to its new place."),
    "cp": _Entry("transfer", "Copy ciphertext, and bind the copy to its place."),
    "inspect": _Entry("files", "Show what files say of themselves, offline."),
    "check": _Entry("check", "Check that files can be served, and that keys decrypt them."),
    "key": _Entry("key", "Make keys, and show who may use them."),
    "mount": _Entry("mount", "Serve a directory of ciphertext as plain files."),
    "umount": _Entry("mount", "Stop serving, and wipe every plaintext."),
    "status": _Entry("control", "Show what mounts serve, and what fails."),
    "why": _Entry("why", "Show what the last open of a file met, and what to do."),
    "lock": _Entry("control", "Wipe every plaintext of a mount and refuse new opens."),
    "unlock": _Entry("control", "Serve again after lock."),
    "refresh": _Entry("control", "Read files of a mount again, now."),
    "config": _Entry("configuration", "Check and show the configuration of volumes."),
}


class LazyGroup(click.Group):
    """The commands of the table above; help is shown without importing any."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Names of all commands, in the table's order."""
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, imported now; None if there is none."""
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"kmsfs.cli.{entry.module}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])
