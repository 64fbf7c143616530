"""`kmsfs config`: what is wrong in a configuration, and where each of its values is from."""

import json
import tomllib
from pathlib import Path

import pytest

from tests.cli.conftest import Commands

KEY = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

_FILE = f"""\
[volume]
name = "web"
unbound = ["old.pem", "two  spaces \\"quoted\\""]

[kms]
key_ids = ["{KEY}"]
encryption_context = {{ service = "web" }}

[[rule]]
match = "*.pem"
mode = "0440"
"""


@pytest.fixture
def volume(kmsfs: Commands) -> Path:
    """A volume with one file, old.pem."""
    directory = kmsfs.directory / "web"
    directory.mkdir()
    (directory / "kmsfs.toml").write_text(_FILE)
    (directory / "old.pem.encrypted").write_bytes(b"x")
    return directory


def test_a_pattern_without_files_is_warned_of_with_its_line(kmsfs: Commands, volume: Path) -> None:
    (volume / "kmsfs.toml").write_text(_FILE.replace('"*.pem"', '"od.pem"'))
    done = kmsfs.good("config", "check", volume)
    assert done.stdout.decode() == f"{volume}: warnings\n"
    file = volume / "kmsfs.toml"
    assert done.stderr == (
        f"kmsfs: warning: {file}: line 3: volume.unbound: 'two  spaces \"quoted\"' matches no "
        "file\nkmsfs: hint: paths are relative to the volume's root\n"
        f"kmsfs: warning: {file}: line 10: rule.match: 'od.pem' matches no file\n"
        "kmsfs: hint: did you mean 'old.pem'?\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "said", "hint"),
    [
        (
            'mode = "0440"',
            'owner = "nobody-of-this-name"',
            "there is no user 'nobody-of-this-name' on this machine",
            "",
        ),
        (
            "unbound",
            "unbond",
            "line 3: unknown key 'unbond' under [volume]",
            "did you mean unbound?",
        ),
        (
            "[[rule]]",
            '[cache]\nmax_bytes = "1MiB"\n[[rule]]',
            "cache.max_file_bytes (16777216) is more than cache.max_bytes (1048576)",
            "",
        ),
    ],
)
def test_what_a_mount_would_refuse_is_an_error(
    kmsfs: Commands, volume: Path, *, old: str, new: str, said: str, hint: str
) -> None:
    (volume / "kmsfs.toml").write_text(_FILE.replace(old, new))
    done = kmsfs("config", "check", volume)
    assert done.status == 2
    assert said in done.stderr
    assert hint in done.stderr
    assert done.stdout.decode() == ""


def test_of_several_each_is_looked_at(kmsfs: Commands, volume: Path) -> None:
    other = kmsfs.directory / "other"
    other.mkdir()
    done = kmsfs("config", "check", other, volume)
    assert done.status == 1
    assert done.stdout.decode() == f"{volume}: warnings\n"
    assert "no kmsfs.toml lies in or above" in done.stderr


def test_what_is_shown_is_a_configuration_that_says_the_same(kmsfs: Commands, volume: Path) -> None:
    shown = kmsfs.good("config", "show", volume)
    assert shown.stderr == ""
    assert f'key_ids = ["{KEY}"]  # {volume}/kmsfs.toml\n' in shown.stdout.decode()
    assert "idle_s = 60.0  # default\n" in shown.stdout.decode()
    assert "# region is not set\n" in shown.stdout.decode()
    raw = tomllib.loads(shown.stdout.decode())
    written = tomllib.loads(_FILE)
    for table in ("volume", "kms"):
        assert raw[table] | written[table] == raw[table]
    assert raw["rule"] == written["rule"]
    (volume / "kmsfs.toml").write_text(shown.stdout.decode())
    again = kmsfs.good("config", "show", volume)
    assert tomllib.loads(again.stdout.decode()) == raw


def test_shown_as_json_each_value_has_its_origin(kmsfs: Commands, volume: Path) -> None:
    record = json.loads(kmsfs.good("config", "show", volume, "--json").stdout.decode())
    assert (record["volume"], record["files"]) == ("web", [str(volume / "kmsfs.toml")])
    origins = {(s["table"], s["key"]): s["origin"] for s in record["settings"]}
    assert origins["rule", "mode"] == str(volume / "kmsfs.toml")
    assert origins["rule", "owner"] == "default"
    assert origins["cache", "idle_s"] == "default"


def test_a_volume_that_is_not_there_is_said(kmsfs: Commands) -> None:
    done = kmsfs("config", "show", "nowhere")
    assert done.status == 2
    assert done.stderr == (
        "kmsfs: error: there is no directory nowhere, and no /etc/kmsfs/nowhere.toml\n"
        "kmsfs: hint: name a directory, or a file there without its suffix\n"
    )
