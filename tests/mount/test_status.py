"""`kmsfs status`: everything that an administrator may want to know, for a person and as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedVolume
from tests.support.sites import Site


@pytest.fixture
def volume(site: Site) -> MountedVolume:
    """A mount of files of every kind, one of which, `key`, is open to be read."""
    site.make_volume("legacy/*")
    site.encrypt("key", site.secret("key", 5000))
    site.encrypt_with_aws_cli("bare.encrypted", site.secret("bare", 40))
    site.encrypt_with_aws_cli("legacy.encrypted", site.secret("legacy", 40))
    (site.source / "legacy").mkdir()
    (site.source / "legacy.encrypted").rename(site.source / "legacy/old.encrypted")
    twin = site.encrypt("twin", site.secret("twin", 40))
    shutil.copyfile(twin, twin.with_suffix(".kms"))
    site.write("cut.encrypted", twin.read_bytes()[:100])
    site.write("READ\nME", b"not ciphertext of any kind\n")
    volume = site.mount()
    assert len((volume.path / "key").read_bytes()) == 5000
    return volume


def block(text: str, heading: str) -> list[str]:
    """The line that begins with a word, and those set in below it, without their indentation."""
    lines = text.splitlines()
    (first,) = (at for at, line in enumerate(lines) if line.startswith(f"  {heading} "))
    found = [lines[first]]
    for line in lines[first + 1 :]:
        if not line.startswith("   "):
            break
        found.append(line)
    return [" ".join(line.split()) for line in found]


def test_text_says_what_is_served_cached_ignored_unbound_and_failing(
    site: Site, volume: MountedVolume
) -> None:
    with (volume.path / "key").open("rb"):
        text = volume.kmsfs("status", volume.path).output
        with (volume.path / "key").open("rb"):
            twice = volume.kmsfs("status", volume.path).output
    heading = f"{volume.path}: {site.source} (fuse view, volume web)"
    assert text.splitlines()[0] == heading
    assert block(text, "state") == ["state serving"]
    assert block(text, "served") == ["served 5 files"]
    first, cached = block(text, "cached")
    assert first.startswith("cached 1 file, 8192 of ")
    assert cached.startswith("key: 5000 bytes, ")
    assert cached.endswith(" s old, open")
    assert block(twice, "cached")[1].endswith(" s old, open 2 times")
    assert block(text, "ignored") == ["ignored 1 file", r"READ\nME: of no known format"]
    assert block(text, "unbound") == ["unbound 1 file", "legacy/old"]
    assert block(text, "failing") == [
        "failing 3 files",
        "bare: NotBound: it is not bound to its place, and binding is required",
        "hint: encrypt it with `kmsfs encrypt`, or name it under unbound in kmsfs.toml",
        "cut: CiphertextInvalid: truncated in its header",
        "hint: restore the file from where it was encrypted, or encrypt it again",
        "twin: NameConflict: claimed by twin.encrypted, twin.kms",
        "hint: remove or rename one of them",
    ]
    assert site.key_arn in block(text, "keys")[0]


def test_json_says_the_same(site: Site, volume: MountedVolume) -> None:
    status: dict[str, Any] = json.loads(volume.kmsfs("status", volume.path, "--json").output)
    assert (status["mountpoint"], status["source"]) == (str(volume.path), str(site.source))
    assert (status["volume"], status["view"], status["locked"]) == ("web", "fuse", False)
    assert (status["served"], status["ignored_count"], status["unbound"]) == (5, 1, ["legacy/old"])
    assert [entry["path"] for entry in status["cached"]] == ["key"]
    assert [item["path"] for item in status["failing"]] == ["bare", "cut", "twin"]
    assert all(item["hint"] for item in status["failing"])


def test_lock_is_shown(volume: MountedVolume) -> None:
    volume.kmsfs("lock", volume.path)
    text = volume.kmsfs("status", volume.path).output
    assert block(text, "state") == ["state LOCKED"]
    assert block(text, "cached")[0].startswith("cached 0 files, 0 of ")


def test_without_a_mountpoint_every_mount_is_shown(
    site: Site, volume: MountedVolume, tmp_path: Path
) -> None:
    other = site.mount(path=tmp_path / "other")
    done = volume.kmsfs("status", exit_code=None)
    for mount in (volume, other):
        assert f"{mount.path}: {site.source} (fuse view, volume web)\n" in done.output, done.stderr
    shown = json.loads(volume.kmsfs("status", "--json", exit_code=None).output)
    assert {str(volume.path), str(other.path)} <= {status["mountpoint"] for status in shown}


def test_what_is_not_mounted_is_a_clear_error(volume: MountedVolume, tmp_path: Path) -> None:
    done = volume.kmsfs("status", tmp_path, exit_code=7)
    assert done.stderr == f"kmsfs: error: nothing of kmsfs is mounted at {tmp_path}\n"


def test_any_key_is_called_weaker(site: Site) -> None:
    site.encrypt_with_aws_cli("key.encrypted", site.secret("key", 40))
    volume = site.mount("--any-key", key=None)
    assert "any key is accepted" in volume.status()["weaknesses"]
