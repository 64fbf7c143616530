"""`kmsfs init`: a directory becomes a volume."""

import base64
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kmsfs.config_files import load_volume_file
from tests.cli.conftest import Commands, KeyMaker
from tests.support.local_keys import LocalKeys, key_arn


@pytest.fixture
def directory(kmsfs: Commands) -> Path:
    made = kmsfs.directory / "my secrets"
    made.mkdir()
    return made


def written(directory: Path) -> dict[str, Any]:
    return tomllib.loads((directory / "kmsfs.toml").read_text())


def test_key_is_stored_as_arn_whatever_it_was_named_by(
    kmsfs: Commands, directory: Path, new_key: KeyMaker, alias: str
) -> None:
    first, second = new_key(alias=alias), new_key()
    done = kmsfs.good("init", directory, "--key-id", alias, "--key-id", second.rpartition("/")[2])
    assert done.stdout.decode() == "my secrets/kmsfs.toml\n"
    assert done.stderr == ""
    assert written(directory)["kms"] == {"key_ids": [first, second]}
    assert load_volume_file(directory / "kmsfs.toml", uid=0).kms.key_ids == (first, second)


def test_volume_is_named_after_its_directory_or_as_told(
    kmsfs: Commands, directory: Path, key: str
) -> None:
    kmsfs.good("init", directory, "--key-id", key)
    assert written(directory)["volume"]["name"] == "my-secrets"
    kmsfs.good("init", directory, "--key-id", key, "--volume", "web", "--force")
    assert written(directory)["volume"]["name"] == "web"
    done = kmsfs("init", directory, "--key-id", key, "--volume", "a/b", "--force")
    assert done.status == 2
    assert done.lines[0] == "kmsfs: error: 'a/b' is not a volume's name"
    assert written(directory)["volume"]["name"] == "web"


def test_existing_file_needs_force(kmsfs: Commands, directory: Path, key: str) -> None:
    (directory / "kmsfs.toml").write_text("mine")
    done = kmsfs("init", directory, "--key-id", key)
    assert done.status == 2
    assert done.lines == [
        f"kmsfs: error: {directory}/kmsfs.toml exists already",
        "kmsfs: hint: add --force to replace it",
    ]
    assert (directory / "kmsfs.toml").read_text() == "mine"


def test_ciphertext_found_is_listed_by_exact_served_path(
    kmsfs: Commands, directory: Path, key: str
) -> None:
    blob = LocalKeys().encrypt(b"x", key_id=key_arn(1), encryption_context={}).ciphertext
    (directory / "sub").mkdir()
    (directory / "sub" / "a[1].pem.kms").write_bytes(blob)
    (directory / "text.encrypted").write_bytes(base64.b64encode(blob))
    (directory / "no-suffix").write_bytes(blob)
    (directory / "moto.kms").write_bytes(b"of no known format, but named as ciphertext")
    (directory / "README").write_text("not ciphertext")
    (directory / "empty.kms").touch()
    (directory / "link.kms").symlink_to("nowhere")
    done = kmsfs.good("init", directory, "--key-id", key, "--unbound", "legacy/*")
    listed = load_volume_file(directory / "kmsfs.toml", uid=0).volume.unbound
    assert listed[0] == "legacy/*"
    from kmsfs.settings import path_matches

    paths = ["moto", "no-suffix", "sub/a[1].pem", "text"]
    assert len(listed) == 1 + len(paths)
    for path, pattern in zip(paths, listed[1:], strict=True):
        assert path_matches(pattern, path)
    assert not path_matches(listed[3], "sub/a1.pem")
    assert done.stderr.startswith("kmsfs: hint: 4 files are not bound to this volume")


def test_bound_files_are_not_listed_again(kmsfs: Commands, volume: Path, key: str) -> None:
    kmsfs.good("encrypt", "-", "--path", "password", stdin=b"x")
    kmsfs.good("init", ".", "--key-id", key, "--force")
    assert load_volume_file(volume / "kmsfs.toml", uid=0).volume.unbound == ()


@pytest.mark.parametrize("name", ["missing", "a-file"])
def test_volume_must_be_a_directory(kmsfs: Commands, key: str, name: str) -> None:
    (kmsfs.directory / "a-file").touch()
    done = kmsfs("init", name, "--key-id", key)
    assert done.status == 2
    assert done.lines[0] == f"kmsfs: error: {kmsfs.directory}/{name} is not a directory"


def test_unknown_key_leaves_nothing_behind(kmsfs: Commands, directory: Path) -> None:
    done = kmsfs("init", directory, "--key-id", "alias/nobody")
    assert done.status == 4
    assert list(directory.iterdir()) == []


def test_key_must_be_named(kmsfs: Commands, directory: Path) -> None:
    done = kmsfs("init", directory)
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: a volume needs a key",
        "kmsfs: hint: name it with --key-id",
    ]


def test_pattern_that_is_not_utf_8_is_refused(kmsfs: Commands, directory: Path, key: str) -> None:
    done = kmsfs("init", directory, "--key-id", key, "--unbound", os.fsdecode(b"caf\xe9"))
    assert done.status == 2
    assert done.lines == ["kmsfs: error: the pattern b'caf\\xe9' is not UTF-8"]
    assert list(directory.iterdir()) == []


def test_directory_that_others_can_write_is_warned_of(
    kmsfs: Commands, directory: Path, key: str
) -> None:
    directory.chmod(0o777)
    done = kmsfs.good("init", directory, "--key-id", key)
    assert done.lines[0].startswith(f"kmsfs: warning: {directory} (owner uid")


def test_endpoint_given_is_kept(kmsfs: Commands, directory: Path, key: str) -> None:
    url = kmsfs.env.pop("AWS_ENDPOINT_URL")
    kmsfs.good("init", directory, "--key-id", key, "--endpoint-url", url)
    assert written(directory)["kms"]["endpoint_url"] == url
