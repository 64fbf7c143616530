"""kmsfs.toml: what it may say, who may have written it, what replaces it."""

import os
from pathlib import Path

import pytest

from kmsfs.config import (
    CacheTable,
    OnChangeTable,
    cache_settings,
    on_change_settings,
    parse_mode,
    parse_size,
)
from kmsfs.config_files import check_trusted, load_volume_file
from kmsfs.errors import ConfigInvalid, ConfigUntrusted
from kmsfs.settings import path_matches


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A volume's kmsfs.toml that nobody else may write."""
    for directory in (tmp_path, tmp_path.parent):
        directory.chmod(0o755)
    return tmp_path / "kmsfs.toml"


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("1 KiB", 1024), ("64MiB", 64 << 20), (" 2GiB ", 2 << 30), ("7B", 7), (5, 5)],
)
def test_sizes_have_binary_units(text: int | str, size_bytes: int) -> None:
    assert parse_size(text, "key") == size_bytes


@pytest.mark.parametrize("text", ["", "1KB", "-1", "1.5MiB", "MiB", -1])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ConfigInvalid, match=r"cache\.max"):
        parse_size(text, "cache.max")


@pytest.mark.parametrize(("text", "mode"), [("0440", 0o440), ("644", 0o644), ("0o600", 0o600)])
def test_modes_are_octal_permissions(text: str, mode: int) -> None:
    assert parse_mode(text, "mode") == mode


@pytest.mark.parametrize("text", ["", "4440", "04000", "9", "0888", "rw", "-444"])
def test_what_is_no_permission_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        parse_mode(text, "mode")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_times_are_finite(value: float) -> None:
    with pytest.raises(ConfigInvalid, match="ttl_s"):
        cache_settings(CacheTable(ttl_s=value))


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("nginx/*", "nginx/a", True),
        ("nginx/*", "nginx/.a", True),
        ("nginx/*", "nginx/a/b", False),
        ("nginx/**", "nginx/a/b", True),
        ("*.pem", "a.pem", True),
        ("*.pem", "x/a.pem", False),
        ("**/*.pem", "x/y/a.pem", True),
        ("a?", "ab", True),
        ("a?", "a/", False),
        ("../*", "../etc", True),
    ],
)
def test_patterns_stay_within_one_directory_unless_told(
    pattern: str, path: str, wanted: bool
) -> None:
    assert path_matches(pattern, path) is wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("volume = 5", "volume is not a table"),
        ("kms = []", "kms is not a table"),
        ("cache = 'x'", "cache"),
        ("[volum]\n", "volum"),
        ("[cache]\nttl = 3", "ttl"),
        ("[cache]\nttl_s = -1", "ttl_s"),
        ("[cache]\nttl_s = '3'", "ttl_s"),
        ("[cache]\nmax_bytes = 'many'", "max_bytes"),
        ("[kms]\ndeadline_s = 0", "deadline_s"),
        ("[volume]\nname = '../x'", "is not a name"),
        ("[[rule]]\nmatch = '*'\nmode = '7777'", "rule.mode"),
        ("[[rule]]\nowner = 'root'", "match"),
        ("[volume]\nsource = '/etc'", "volume.source is accepted from"),
        ("[kms]\nrole_arn = 'arn'", "kms.role_arn is accepted from"),
        ("[[on_change]]\nmatch = '*'\nrun = ['x']", "on_change is accepted from"),
        ("not toml", "kmsfs.toml"),
        ("a = '\udcff'", "kmsfs.toml"),
    ],
)
def test_what_it_may_not_say_is_refused_by_name(toml: Path, text: str, reason: str) -> None:
    toml.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigInvalid, match=reason):
        load_volume_file(toml, uid=os.geteuid(), overlay_dir=toml.parent / "no-overlay")


def test_what_is_no_regular_file_of_sensible_size_is_refused(toml: Path) -> None:
    os.mkfifo(toml)
    with pytest.raises(ConfigInvalid, match="not a regular file"):
        load_volume_file(toml, uid=os.geteuid())
    toml.unlink()
    toml.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigInvalid, match="larger than"):
        load_volume_file(toml, uid=os.geteuid())


def test_the_systems_own_file_replaces_key_by_key(toml: Path, tmp_path: Path) -> None:
    toml.write_text("[volume]\nname = 'web'\n[cache]\nttl_s = 1\nidle_s = 2\n[kms]\nregion = 'a'\n")
    overlay = tmp_path / "system"
    overlay.mkdir(mode=0o755)
    (overlay / "web.toml").write_text("[cache]\nttl_s = 9\n[kms]\nrole_arn = 'arn:role'\n")
    (overlay / "web.toml").chmod(0o644)
    if os.geteuid() != 0:
        with pytest.raises(ConfigUntrusted):
            load_volume_file(toml, uid=os.geteuid(), overlay_dir=overlay)
        return
    found = load_volume_file(toml, uid=0, overlay_dir=overlay)
    assert (found.cache.ttl_s, found.cache.idle_s) == (9, 2)
    assert (found.kms.role_arn, found.kms.region) == ("arn:role", "a")


def test_on_change_of_the_systems_own_file_is_honoured(toml: Path, tmp_path: Path) -> None:
    toml.write_text("[volume]\nname = 'web'\n")
    overlay = tmp_path / "system"
    overlay.mkdir(mode=0o755)
    file = overlay / "web.toml"
    file.write_text(
        "[[on_change]]\nmatch = 'a'\nrun = ['x']\n[[on_change]]\nmatch = 'b'\nunit = 'u'\n"
    )
    file.chmod(0o644)
    if os.geteuid() != 0:
        pytest.skip("writes the system's configuration")
    found = load_volume_file(toml, uid=0, overlay_dir=overlay)
    assert [hook.match for hook in found.on_change] == ["a", "b"]
    file.write_text("[[on_change]]\nmatch = 'a'\nrun = ['x']\n" * 65)
    with pytest.raises(ConfigInvalid, match="more than 64"):
        load_volume_file(toml, uid=0, overlay_dir=overlay)


def test_on_change_comes_to_a_command() -> None:
    run = OnChangeTable(match="nginx/*", run=("systemctl", "reload", "nginx"))
    assert on_change_settings(run).argv == ("systemctl", "reload", "nginx")
    unit = OnChangeTable(match="nginx/*", unit="nginx@a\\x2d1.service")
    assert on_change_settings(unit).argv == (
        "systemctl",
        "try-reload-or-restart",
        "nginx@a\\x2d1.service",
    )


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (OnChangeTable(match="*"), "either run or unit"),
        (OnChangeTable(match="*", run=("x",), unit="y"), "either run or unit"),
        (OnChangeTable(match="*", run=("",)), "an absolute path, or a name"),
        (OnChangeTable(match="*", run=("bin/x",)), "an absolute path, or a name"),
        (OnChangeTable(match="*", run=("x", "a\0b")), "null character"),
        (OnChangeTable(match="*", unit=""), "not the name of a unit"),
        (OnChangeTable(match="*", unit="--no-block"), "not the name of a unit"),
        (OnChangeTable(match="*", unit="a b"), "not the name of a unit"),
    ],
)
def test_on_change_that_could_not_be_run_is_refused(table: OnChangeTable, reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        on_change_settings(table)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_could_write_is_not_honoured(toml: Path, mode: int) -> None:
    toml.write_text("")
    toml.chmod(mode)
    with pytest.raises(ConfigUntrusted, match=f"mode 0{mode:o}"):
        check_trusted(toml, uid=os.geteuid())


def test_a_directory_that_others_could_write_is_not_honoured_unless_sticky(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    file = directory / "kmsfs.toml"
    file.write_text("")
    file.chmod(0o644)
    directory.chmod(0o777)
    with pytest.raises(ConfigUntrusted, match="shared"):
        check_trusted(file, uid=os.geteuid())
    directory.chmod(0o1777)
    check_trusted(file, uid=os.geteuid())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_file_of_somebody_else_is_not_honoured(toml: Path) -> None:
    toml.write_text("")
    toml.chmod(0o644)
    os.chown(toml, 12345, 12345)
    with pytest.raises(ConfigUntrusted, match="belongs to uid 12345"):
        check_trusted(toml, uid=0)
    check_trusted(toml, uid=12345)
