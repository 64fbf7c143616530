"""The entry point: every outcome has its status and its one form."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.conftest import Commands


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def test_version_is_the_packages(bare_kmsfs: Commands) -> None:
    assert bare_kmsfs.good("--version").stdout.decode() == f"kmsfs {version('kmsfs')}\n"


def test_help_lists_every_command_and_each_has_help(bare_kmsfs: Commands) -> None:
    from kmsfs.cli import cli
    from kmsfs.cli.lazy import _COMMANDS

    text = bare_kmsfs.good("--help").stdout.decode()
    for name, entry in _COMMANDS.items():
        assert f"  {name} " in text
        assert entry.summary in text
        assert cli.get_command(None, name).help  # type: ignore[arg-type, union-attr]


def test_no_command_shows_help_and_is_wrong_usage(bare_kmsfs: Commands) -> None:
    done = bare_kmsfs()
    assert done.status == 2
    assert done.stdout == b""
    assert done.stderr.startswith("Usage: kmsfs")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], ["No such command 'nothing'.", "see `kmsfs --help`"]),
        (["inspect"], ["Missing argument 'FILE...'.", "see `kmsfs inspect --help`"]),
        (["inspect", "--nothing"], ["No such option '--nothing'.", "see `kmsfs inspect --help`"]),
        (
            ["decrypt", "x", "--encryption-context", "ab"],
            [
                "Invalid value for '--encryption-context': 'ab' is not of the form K=V.",
                "see `kmsfs decrypt --help`",
            ],
        ),
        (
            ["decrypt", "x", "--encryption-context", "a=b", "--encryption-context", "a=c"],
            [
                "Invalid value for '--encryption-context': 'a' is given twice.",
                "see `kmsfs decrypt --help`",
            ],
        ),
        (
            ["decrypt", "x", "--key-id", ""],
            [
                "Invalid value for '--key-id': a key id cannot be empty.",
                "see `kmsfs decrypt --help`",
            ],
        ),
    ],
)
def test_wrong_usage_is_said_in_the_form_of_every_error(
    bare_kmsfs: Commands, arguments: list[str], expected: list[str]
) -> None:
    done = bare_kmsfs(*arguments)
    assert done.status == 2
    assert done.lines == [f"kmsfs: error: {expected[0]}", f"kmsfs: hint: {expected[1]}"]


def test_completion_knows_commands_and_options(bare_kmsfs: Commands) -> None:
    def complete(words: str, position: int) -> str:
        bare_kmsfs.env |= {
            "_KMSFS_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        return bare_kmsfs().stdout.decode()

    assert "plain,encrypt\n" in complete("kmsfs en", 1)
    assert "plain,--any-key\n" in complete("kmsfs decrypt --an", 2)
    bare_kmsfs.env["_KMSFS_COMPLETE"] = "bash_source"
    assert "_kmsfs_completion" in bare_kmsfs().stdout.decode()


# A command whose bug has a secret in its text.
_BUG = """
import sys, types
import click
module = types.ModuleType("kmsfs.cli.files")
@click.command()
def inspect():
    raise {raised}
module.inspect = inspect
sys.modules["kmsfs.cli.files"] = module
from kmsfs.cli import main
sys.argv = ["kmsfs", "inspect"]
main()
"""


def test_unexpected_exception_shows_its_class_and_no_content(tmp_path: Path) -> None:
    done = python(_BUG.format(raised="ValueError('hunter2')"), cwd=tmp_path)
    assert done.returncode == 70
    first, second = done.stderr.splitlines()
    assert first == "kmsfs: error: internal error: ValueError"
    assert second.startswith("kmsfs: hint: this is a bug in kmsfs: please report it")
    assert "hunter2" not in done.stderr


def test_interrupt_is_quiet(tmp_path: Path) -> None:
    done = python(_BUG.format(raised="KeyboardInterrupt"), cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == ""


def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    ciphertext = tmp_path / "x"
    ciphertext.write_bytes(bytes.fromhex("0102020078") + bytes(100))
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", "inspect", ciphertext],
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE
    assert stderr == b""


@pytest.mark.parametrize(
    "module", ["kmsfs.cli", "kmsfs.cli.mount", "kmsfs.cli.control", "kmsfs.cli.files"]
)
def test_commands_import_no_slow_library_before_they_need_it(module: str, tmp_path: Path) -> None:
    done = python(
        f"import sys, {module}\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('boto3', 'botocore', 'aws_encryption_sdk', 'pyfuse3', 'trio', 'rich', "
        "'prometheus_client')])",
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "[]"


def test_names_are_escaped_on_the_terminal(bare_kmsfs: Commands) -> None:
    done = bare_kmsfs("inspect", "no\x1b[31m\nsuch")
    assert done.lines == [r"kmsfs: error: no\x1b[31m\nsuch: No such file or directory"]
    assert done.status == 2
