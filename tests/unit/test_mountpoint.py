"""The mount table and what can be mounted on; without mounting anything."""

import os
from pathlib import Path

import pytest

from kmsfs.errors import MountpointUnusable
from kmsfs.views import mountpoint as mounts


def test_the_mount_table_is_that_of_the_kernel() -> None:
    table = mounts.mount_table()
    root = mounts.find_mount("/")
    assert root in table
    assert root is not None
    assert root.device_number == os.stat("/").st_dev
    proc = mounts.find_mount("/proc")
    assert proc is not None
    assert proc.fs_type == "proc"
    assert mounts.find_mount("/nowhere/at/all") is None
    assert root in mounts.mounts_of(root.device)


def test_escapes_of_the_mount_table_are_undone() -> None:
    assert (
        mounts._unescape(r"/with\040space\011tab\134back\012line") == "/with space\ttab\\back\nline"
    )


def test_an_empty_directory_can_be_mounted_on(tmp_path: Path) -> None:
    mounts.prepare(str(tmp_path))


def test_what_cannot_be_mounted_on_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for name, reason, hint in (
        ("missing", "does not exist", "mkdir -p"),
        ("file", "is not a directory", ""),
        ("file/below", "Not a directory", ""),
        ("link", "is a symbolic link", "leads to"),
        ("full", "is not empty", "empty directory"),
    ):
        with pytest.raises(MountpointUnusable, match=reason) as caught:
            mounts.prepare(str(tmp_path / name))
        assert hint in caught.value.hint
    assert (tmp_path / "full" / "x").exists()


def test_only_the_parents_links_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "last").symlink_to("elsewhere")
    assert mounts.resolve(str(tmp_path / "link" / "last")) == str(tmp_path / "real" / "last")
    monkeypatch.chdir(tmp_path)
    assert mounts.resolve("link/x/../y/") == str(tmp_path / "real" / "y")
    assert mounts.resolve("/") == "/"


def test_a_live_place_is_not_dead(tmp_path: Path) -> None:
    assert not mounts.is_dead(str(tmp_path))
    assert not mounts.is_dead(str(tmp_path / "missing"))
