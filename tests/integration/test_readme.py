"""The README is right: its commands run as written, and its tables are what the code does."""

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import pytest

from kmsfs import config, config_files, errors
from kmsfs.cli import cli
from kmsfs.errors import ExitCode, KmsfsError
from kmsfs.settings import DEFAULT_TTL_S
from tests.support import readme
from tests.support.moto_kms import MotoKms
from tests.support.private_machine import Session, run_session
from tests.support.requirements import require_mount

_SESSION_S = 600

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Blocks that have tests of their own.
_SCRIPTS = {("./contrib/demo",), ("./contrib/test",)}

# What a checkout must have to be installed.
_CHECKOUT = ("pyproject.toml", "README.md", "LICENSE", "kmsfs")


# --- its commands --------------------------------------------------------------------------------


def session_commands() -> list[str]:
    """Every command of the README but the scripts; installing comes first, as for its reader."""
    found = [block for block in readme.blocks("console") if block.commands not in _SCRIPTS]
    found.sort(key=lambda block: block.section != "Install")
    return [command for block in found for command in block.commands]


def checkout(directory: Path) -> Path:
    """A copy to install from: that writes into the checkout."""
    directory.mkdir()
    for name in _CHECKOUT:
        path = readme.ROOT / name
        if path.is_dir():
            shutil.copytree(
                path, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(path, directory)
    return directory


def programs(directory: Path) -> Path:
    """A directory with the AWS CLI, and nothing else of the environment of the tests."""
    directory.mkdir()
    (directory / "aws").symlink_to(Path(sys.executable).with_name("aws"))
    return directory


@pytest.fixture(scope="module")
def session(moto_kms: MotoKms, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """All commands of the README, run as root by one shell."""
    require_mount()
    if shutil.which("apt-get") is None:
        pytest.skip("the README installs with apt")
    directory = tmp_path_factory.mktemp("readme")
    (directory / "private").mkdir()
    # Nothing may change that is installed already: that would be this machine's own.
    apt = directory / "apt.conf"
    apt.write_text('APT::Get::Upgrade "false";\nDebug::NoLocking "true";\n')
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "KMSFS_", "PYTEST_", "PYTHON"))
    }
    env = {
        **kept,
        **moto_kms.env(HOME=os.path.expanduser("~")),
        "PATH": f"{_SYSTEM_PATH}:{programs(directory / 'bin')}",
        "APT_CONFIG": str(apt),
    }
    return run_session(
        [*session_commands(), "complete -p kmsfs", "command -v kmsfs"],
        directory=directory / "private",
        env=env,
        cwd=checkout(directory / "checkout"),
        timeout_s=_SESSION_S,
    )


def test_packages_of_the_readme_are_installed_by_the_scripts_too() -> None:
    (line,) = [command for command in session_commands() if command.startswith("apt-get")]
    installed = (readme.ROOT / "contrib/lib/setup.sh").read_text().split("need_packages python3")[1]

    packages = set(line.removeprefix("apt-get install -y ").split())

    assert packages <= set(installed.partition("\n}")[0].split())


def test_every_command_succeeds(session: Session) -> None:
    assert [ran for ran in session.ran if ran.status != 0] == []
    assert [ran.command for ran in session.ran][:-2] == session_commands()


def test_nothing_stays_mounted(session: Session) -> None:
    assert session.left_mounted == ()


def test_session_leaves_the_machine_as_it_was(session: Session) -> None:
    assert [ran.status for ran in session.ran if "/opt/kmsfs" in ran.command] == [0, 0, 0]
    for path in ("/etc/secrets/web", "/run/kmsfs/web", "/opt/kmsfs"):
        assert not os.path.exists(path)


def test_installed_program_is_the_one_that_ran(session: Session) -> None:
    assert session.of("command -v kmsfs").stdout == b"/usr/local/bin/kmsfs\n"
    assert re.fullmatch(rb"kmsfs \d+\.\d+\.\d+\n", session.of("kmsfs --version").stdout)


def test_shell_completion_is_there_after_its_line(session: Session) -> None:
    assert session.of("complete -p").stdout.endswith(b" kmsfs\n")


def test_commands_show_what_the_readme_promises(session: Session) -> None:
    assert session.of("ls -l /run/kmsfs/web").stdout.startswith(b"-r--------")
    assert b"Key is valid" in session.of("openssl pkey").stdout
    assert session.of("cat /run/kmsfs/app/db/password").stdout == b"correct horse battery staple"
    assert session.of("kmsfs decrypt").stdout.strip() == b"28"
    assert b"fits" in session.of("kmsfs inspect").stdout
    assert session.of("ls -lL /run/kmsfs/ram/db").stdout.splitlines()[1].startswith(b"-r--------")
    assert b"\n  good     " in session.of("kmsfs status --security").stdout
    status = session.of("kmsfs status /run/kmsfs/app").stdout
    assert b"serving" in status
    assert b"db/password: 28 bytes" in status


def test_blocks_are_all_run_or_tested_elsewhere() -> None:
    languages = [block.language for block in (*readme.blocks(""), *readme.blocks("toml"))]
    scripts = [block for block in readme.blocks("console") if block.commands in _SCRIPTS]

    assert languages == ["", "toml"]
    assert len(scripts) == len(_SCRIPTS)
    for block in readme.blocks("console"):
        assert all(line.startswith("$ ") for line in block.lines), block


def test_test_script_can_be_run_and_is_what_the_checks_run() -> None:
    script = readme.ROOT / "contrib/test"

    assert os.access(script, os.X_OK)
    assert "\n./contrib/test\n" in (readme.ROOT / ".ci/run").read_text()
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


# --- its words on the command line ---------------------------------------------------------------


def commands_of_the_program() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def options_of(command: click.Command) -> set[str]:
    """Those of the command and of its subcommands."""
    context = click.Context(command, help_option_names=["-h", "--help"])
    below = command.commands.values() if isinstance(command, click.Group) else ()
    found = set[str]().union(*map(options_of, below))
    return found | {text for parameter in command.get_params(context) for text in parameter.opts}


@pytest.mark.parametrize("name", commands_of_the_program())
def test_every_command_is_mentioned(name: str) -> None:
    assert re.search(rf"(kmsfs |`){name}\b", readme.TEXT)


def test_options_in_the_readme_exist() -> None:
    commands = commands_of_the_program()
    everywhere = options_of(cli).union(*map(options_of, commands.values()))
    inline = re.findall(r"`([^`\n]+)`", readme.TEXT)
    typed = [part for line in session_commands() for part in line.split(" | ")]

    for text in [*inline, *typed]:
        words = text.split()
        options = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        if words[0] == "kmsfs" and len(words) > 1:
            assert options <= (options_of(commands.get(words[1], cli)) | {"--help"}), text
        elif words[0] in options:
            assert options <= everywhere, text


def test_mount_options_in_the_readme_exist() -> None:
    from kmsfs.manage.mounting import MountOptions, with_option_text

    named = re.findall(r"`-o ([a-z_,]+)`", readme.TEXT)

    assert named == ["allow_other"]
    assert with_option_text(MountOptions(), named[0]).allow_other


def test_exit_codes_are_those_of_the_program() -> None:
    from contrib.docs.make_man import EXIT_STATUS

    sentence = " ".join(readme.TEXT.partition("Commands exit with ")[2].split("\n\n")[0].split())

    told = {int(code): text for code, text in re.findall(r"(\d+) \(([^)]*)\)", sentence)}

    assert told == {int(code): text for code, text in EXIT_STATUS.items()}
    # The mount helper's is not one of the program's own.
    assert set(told) == set(ExitCode) - {ExitCode.MOUNT_HELPER_FAILED}


# --- its table of errors -------------------------------------------------------------------------

_HAPPENED: dict[str, tuple[type[KmsfsError], ...]] = {
    "file permissions say no": (errors.PolicyDenied,),
    "KMS says no, or it is not an allowed key": (
        errors.KeyAccessDenied,
        errors.KeyNotAllowed,
        errors.IncorrectKey,
        errors.KeyNotFound,
    ),
    "the key is disabled or pending deletion": (errors.KeyUnusable,),
    "the volume is locked": (errors.VolumeLocked,),
    "not authentic, truncated, bound to another place, not bound, rolled back": (
        errors.CiphertextInvalid,
        errors.FormatUnknown,
        errors.AlgorithmNotAllowed,
        errors.ContextMismatch,
        errors.NotBound,
        errors.RolledBack,
        errors.CiphertextChanging,
    ),
    "no usable AWS credentials": (errors.CredentialsUnavailable, errors.RegionUnknown),
    "KMS cannot be reached, or throttles, past the deadline": (
        errors.KmsUnreachable,
        errors.KmsThrottled,
        errors.DeadlineExceeded,
        errors.TooManyWaiting,
    ),
    "two source files for one name": (errors.NameConflict,),
    "larger than `max_file_bytes`": (errors.FileTooLarge,),
    "no locked memory left": (errors.LockedMemoryExhausted, errors.GuaranteeNotMet),
    "anything else": (
        errors.KmsAnswerInvalid,
        errors.SourceUnreadable,
        errors.AuditFailed,
        errors.WorkerFailed,
        errors.WorkerBug,
        errors.DaemonBug,
    ),
}


@dataclass(frozen=True)
class Row:
    happened: str
    name: str
    said: str


ROWS = [Row(*cells) for cells in readme.table("When something fails")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_of_errors_is_what_programs_get(row: Row) -> None:
    number = getattr(errno, row.name)

    assert row.said == os.strerror(number)
    assert {cls.errno for cls in _HAPPENED[row.happened]} == {number}


def test_every_error_of_an_open_is_in_the_table() -> None:
    """All but those of a command line, of mounting, and of a name that is not there."""
    elsewhere = {
        errors.UsageInvalid, errors.OutputExists, errors.InputUnreadable, errors.OutputUnwritable,
        errors.PlaintextTooLarge, errors.ConfigInvalid, errors.ConfigUntrusted,
        errors.KeyPolicyRefused,
        errors.MountpointUnusable, errors.MountFailed, errors.FuseUnavailable,
        errors.ControlUnavailable, errors.SourceMissing,
        # Of the ramfs view, whose files are simply not there.
        errors.RamLimitReached,
    }  # fmt: skip
    told = {cls for classes in _HAPPENED.values() for cls in classes}

    assert [row.happened for row in ROWS] == list(_HAPPENED)
    assert every_error(KmsfsError) == told | elsewhere


def every_error(root: type[KmsfsError]) -> set[type[KmsfsError]]:
    found = {cls for cls in root.__subclasses__() if cls.__module__ == errors.__name__}
    return found.union(*map(every_error, found))


# --- its kmsfs.toml ------------------------------------------------------------------------------

# Told in the text: only the system configuration may set them.
_SYSTEM_KEYS = {
    ("volume", "source"),
    ("volume", "mountpoint"),
    ("kms", "profile"),
    ("kms", "role_arn"),
    ("on_change", "match"),
    ("on_change", "run"),
    ("on_change", "unit"),
    ("audit", "file"),
    ("audit", "required"),
}


def toml_text() -> str:
    (block,) = readme.blocks("toml")
    return "\n".join(block.lines) + "\n"


def test_kmsfs_toml_loads(tmp_path: Path) -> None:
    path = tmp_path / "kmsfs.toml"
    path.write_text(toml_text())

    file = config_files.load_volume_file(path, uid=os.geteuid(), overlay_dir=tmp_path / "none")

    assert (file.volume.name, len(file.kms.key_ids), len(file.rule)) == ("web", 1, 1)


def test_defaults_in_kmsfs_toml_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "kmsfs.toml"
    path.write_text(toml_text())

    file = config_files.load_volume_file(path, uid=os.geteuid(), overlay_dir=tmp_path / "none")

    # What is prefetched is an example; the default is nothing.
    assert file.cache == config.CacheTable(ttl_s=DEFAULT_TTL_S["fuse"], prefetch=("*.pem",))
    assert f"The default of `ttl_s` is {file.cache.ttl_s:.0f} in the FUSE view" in readme.TEXT
    assert f"and {DEFAULT_TTL_S['ramfs']:.0f}, never, in the ramfs view." in readme.TEXT
    assert file.volume.view == config.VolumeTable().view
    assert file.volume.rollback == config.VolumeTable().rollback
    assert file.kms.deadline_s == config.KmsTable().deadline_s
    assert file.kms.allow_non_committing == config.KmsTable().allow_non_committing


def test_every_key_of_kmsfs_toml_is_told() -> None:
    import tomllib

    written = tomllib.loads(toml_text())
    tables = {
        "volume": config.VolumeTable,
        "kms": config.KmsTable,
        "cache": config.CacheTable,
        "rule": config.RuleTable,
        "on_change": config.OnChangeTable,
        "audit": config.AuditTable,
    }
    schema = {
        (table, field.name)
        for table, cls in tables.items()
        for field in msgspec.structs.fields(cls)
    }
    told = {
        (name, key)
        for name, table in written.items()
        for key in (table[0] if isinstance(table, list) else table)
    }

    assert told == schema - _SYSTEM_KEYS
    for _, key in _SYSTEM_KEYS:
        assert f"`{key}`" in readme.TEXT
