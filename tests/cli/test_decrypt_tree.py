"""`kmsfs decrypt -r`: plaintext goes to memory alone, unless it is forced elsewhere."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume, names_below
from tests.cli.conftest import Commands
from tests.support.strict_kms import StrictKms


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


@pytest.fixture(params=["ramfs", "tmpfs"])
def memory(request: pytest.FixtureRequest, mountable: None, tmp_path: Path) -> Iterator[Path]:
    """A filesystem that is never swapped."""
    path = tmp_path / "memory"
    path.mkdir()
    options = ["-o", "noswap"] if request.param == "tmpfs" else []
    made = subprocess.run(
        ["mount", "-t", request.param, *options, "none", path], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no {request.param} {options} can be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_tree_is_decrypted_into_memory(volume: BulkVolume, memory: Path) -> None:
    volume.encrypt("a.pem", "db/main/password")
    (volume.root / "notes").write_bytes(b"not secret")
    (volume.root / "link").symlink_to("db")
    done = volume.kmsfs.good("decrypt", "-r", "web", "-o", memory / "out")
    assert done.lines == [
        "kmsfs: warning: web/link is a symbolic link, and not followed",
        "kmsfs: 2 files decrypted, 2 skipped (1 kmsfs.toml, 1 no ciphertext)",
    ]
    assert names_below(memory / "out") == {"a.pem", "db/main/password"}
    for name in ("a.pem", "db/main/password"):
        path = memory / "out" / name
        assert path.read_bytes() == volume.content(name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    done = volume.kmsfs("decrypt", "-r", "web", "-o", memory / "out")
    assert done.status == 1
    assert f"kmsfs: error: web/a.pem.encrypted: {memory}/out/a.pem exists already" in done.lines
    volume.kmsfs.good("decrypt", "-r", "web", "-o", memory / "out", "--force")


def test_directory_on_disk_is_refused_unless_forced(volume: BulkVolume) -> None:
    volume.encrypt("a")
    done = volume.kmsfs("decrypt", "-r", "web", "-o", "out")
    out = volume.root.parent / "out"
    assert done.status == 6
    assert done.stderr == (
        f"kmsfs: error: {out} lies neither on a ramfs nor on a tmpfs mounted with noswap\n"
        "kmsfs: hint: mount a ramfs there, or add --force to put plaintext where it may reach a "
        "disk\n"
    )
    assert not out.exists()
    done = volume.kmsfs.good("decrypt", "-r", "web", "-o", "out", "--force")
    assert done.lines[-1] == "kmsfs: warning: out lies on disk, and holds plaintext now"
    assert (out / "a").read_bytes() == volume.content("a")


def test_link_in_memory_that_leads_to_a_disk_is_refused(volume: BulkVolume, memory: Path) -> None:
    volume.encrypt("a", "db/b")
    disk = volume.root.parent / "disk"
    disk.mkdir()
    (memory / "db").symlink_to(disk)
    done = volume.kmsfs("decrypt", "-r", "web", "-o", memory)
    assert done.status == 1
    assert done.lines[0] == (
        f"kmsfs: error: web/db/b.encrypted: {memory}/db lies neither on a ramfs nor on a tmpfs "
        "mounted with noswap"
    )
    assert list(disk.iterdir()) == []
    assert (memory / "a").read_bytes() == volume.content("a")


def test_tmpfs_that_may_be_swapped_is_refused(volume: BulkVolume) -> None:
    path = Path("/dev/shm")
    if not os.path.ismount(path) or "noswap" in Path("/proc/mounts").read_text():
        pytest.skip("/dev/shm is no tmpfs that may be swapped here")
    done = volume.kmsfs("decrypt", "-r", "web", "-o", path / f"kmsfs-test-{os.getpid()}")
    assert done.status == 6
    assert not (path / f"kmsfs-test-{os.getpid()}").exists()


def test_file_that_does_not_decrypt_is_named_and_the_rest_is_there(
    volume: BulkVolume, memory: Path
) -> None:
    volume.encrypt("a", "b", "c")
    volume.path("b").rename(volume.path("moved"))
    content = bytearray(volume.path("c").read_bytes())
    content[-1] ^= 1
    volume.path("c").write_bytes(content)
    done = volume.kmsfs("decrypt", "-r", "web", "-o", memory)
    assert done.status == 1
    assert sum(": error: " in line for line in done.lines) == 2
    assert "kmsfs: 1 file decrypted, 1 skipped (1 kmsfs.toml), 2 failed" in done.lines
    assert names_below(memory) == {"a"}


def test_unbound_file_is_decrypted_and_warned_of(volume: BulkVolume, memory: Path) -> None:
    volume.blob("old")
    done = volume.kmsfs.good("decrypt", "-r", "web", "-o", memory)
    assert (memory / "old").read_bytes() == volume.content("old")
    assert any(
        line.endswith("it is bound to no place, so volume 'web' does not serve it")
        for line in done.lines
    )


@pytest.mark.parametrize(
    "arguments", [["web"], ["-", "-o", "x"], ["web", "-o", "x", "--path", "y"]]
)
def test_wrong_usage_is_refused(volume: BulkVolume, arguments: list[str]) -> None:
    done = volume.kmsfs("decrypt", "-r", *arguments)
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: -r takes a directory and needs one to put files in: -o OUT"
    ]
