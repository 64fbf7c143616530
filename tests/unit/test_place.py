"""Which volume a directory belongs to, and the path that a file of it is served under."""

from pathlib import Path

import pytest

from kmsfs.errors import ConfigInvalid, ConfigUntrusted
from kmsfs.manage.place import VolumeHere, place_of, volume_above

KEY = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture
def system_dir(tmp_path: Path) -> Path:
    path = tmp_path / "etc"
    path.mkdir()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "srv" / "source"
    path.mkdir(parents=True)
    return path


def define(system_dir: Path, name: str, source: Path | str, more: str = "") -> Path:
    path = system_dir / f"{name}.toml"
    path.write_text(f'[volume]\nsource = "{source}"\n{more}\n[kms]\nkey_ids = ["{KEY}"]\n')
    return path


def found(directory: Path, system_dir: Path) -> VolumeHere:
    volume = volume_above(directory, system_dir=system_dir)
    assert volume is not None
    return volume


def test_directory_of_no_volume_has_none(source: Path, system_dir: Path) -> None:
    define(system_dir, "other", source.parent / "elsewhere")
    (system_dir / "overlay.toml").write_text("[kms]\n")

    assert volume_above(source, system_dir=system_dir) is None


def test_no_system_configuration_is_no_error(source: Path, tmp_path: Path) -> None:
    assert volume_above(source, system_dir=tmp_path / "missing") is None


def test_system_file_alone_defines_a_volume(source: Path, system_dir: Path) -> None:
    define(system_dir, "web", source)

    volume = found(source, system_dir)

    assert (volume.root, volume.name) == (source, "web")
    assert volume.file.kms.key_ids == (KEY,)


def test_paths_are_relative_to_the_source_that_the_system_file_names(
    source: Path, system_dir: Path
) -> None:
    define(system_dir, "web", source)
    below = source / "nginx" / "tls"
    below.mkdir(parents=True)

    place = place_of(below / "ssl.pem.encrypted", found(below, system_dir))

    assert (place.volume, place.path) == ("web", "nginx/tls/ssl.pem")


def test_nearest_source_wins(source: Path, system_dir: Path) -> None:
    define(system_dir, "inner", source)
    define(system_dir, "outer", source.parent)

    assert found(source, system_dir).name == "inner"
    assert found(source.parent, system_dir).name == "outer"


def test_directory_whose_name_begins_like_the_source_is_outside(
    source: Path, system_dir: Path
) -> None:
    define(system_dir, "web", source)
    beside = source.with_name(source.name + "-old")
    beside.mkdir()

    assert volume_above(beside, system_dir=system_dir) is None


@pytest.mark.parametrize("which", ["source is a link", "directory is a link", "trailing slash"])
def test_source_is_found_by_any_of_its_paths(which: str, source: Path, system_dir: Path) -> None:
    link = source.parent / "link"
    link.symlink_to(source)
    (source / "sub").mkdir()
    match which:
        case "source is a link":
            named, directory = link, source / "sub"
        case "directory is a link":
            named, directory = source, link / "sub"
        case _:
            named, directory = f"{source}/", source / "sub"
    define(system_dir, "web", named)

    volume = found(directory, system_dir)

    assert volume.name == "web"
    assert place_of(directory / "a.kms", volume).path == "sub/a"


def test_volume_with_a_file_of_its_own_needs_no_source(source: Path, system_dir: Path) -> None:
    (source / "kmsfs.toml").write_text('[volume]\nname = "web"\n')
    (system_dir / "web.toml").write_text("[kms]\ndeadline_s = 3.0\n")
    (system_dir / "broken.toml").write_text("not toml")

    assert found(source, system_dir).file.kms.deadline_s == 3.0


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("web", "not toml", "web.toml"),
        ("web", '[volume]\nsource = "srv"\n', "absolute"),
        ("web", '[volume]\nsource = "/srv"\nname = "app"\n', "called after"),
        ("-", '[volume]\nsource = "/srv"\n', "called after"),
        ("web", "[volume]\nsauce = 1\n", "sauce"),
    ],
)
def test_system_file_that_cannot_be_honoured_is_named(
    name: str, text: str, said: str, source: Path, system_dir: Path
) -> None:
    (system_dir / f"{name}.toml").write_text(text)

    with pytest.raises(ConfigInvalid, match=said) as refused:
        volume_above(source, system_dir=system_dir)

    assert f"{name}.toml" in refused.value.detail


def test_two_system_files_cannot_claim_one_directory(source: Path, system_dir: Path) -> None:
    define(system_dir, "app", source)
    define(system_dir, "web", source)

    with pytest.raises(ConfigInvalid, match=r"web\.toml.*'app' already"):
        volume_above(source, system_dir=system_dir)


def test_system_file_that_others_may_write_is_refused(source: Path, system_dir: Path) -> None:
    define(system_dir, "web", source).chmod(0o666)

    with pytest.raises(ConfigUntrusted, match=r"web\.toml"):
        volume_above(source, system_dir=system_dir)
