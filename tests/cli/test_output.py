"""Files are written whole or not at all, with and without nameless files."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from kmsfs.errors import OutputExists, OutputUnwritable
from kmsfs.manage import output
from kmsfs.manage.output import check_output, write_file

real_open = os.open


def open_without_tmpfile(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return real_open(path, flags, *arguments, **options)


@pytest.fixture(params=["nameless", "named"])
def directory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A directory whose filesystem has nameless files, and one whose has none."""
    if request.param == "named":
        monkeypatch.setattr(output.os, "open", open_without_tmpfile)
    return tmp_path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_file_is_written_with_its_mode_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0o077)
    try:
        write_file(directory / "a", b"content", replace=False)
        write_file(directory / "b", memoryview(b""), replace=True, mode=0o644)
    finally:
        os.umask(before)
    assert (directory / "a").read_bytes() == b"content"
    assert (directory / "a").stat().st_mode & 0o7777 == 0o600
    assert (directory / "b").stat().st_mode & 0o7777 == 0o644
    assert names(directory) == {"a", "b"}


def test_existing_file_is_replaced_only_when_told(directory: Path) -> None:
    target = directory / "a"
    target.write_bytes(b"old")
    for call in (
        lambda: write_file(target, b"new", replace=False),
        lambda: check_output(target, replace=False),
    ):
        with pytest.raises(OutputExists):
            call()
    assert target.read_bytes() == b"old"
    with target.open("rb") as held:
        write_file(target, b"new", replace=True)
        assert held.read() == b"old"
    assert target.read_bytes() == b"new"
    assert names(directory) == {"a"}


def test_file_that_appears_meanwhile_is_not_overwritten(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = directory / "a"
    real_fsync = os.fsync

    def appear(fd: int) -> None:
        real_fsync(fd)
        if not target.exists():
            target.write_bytes(b"somebody else's")

    monkeypatch.setattr(output.os, "fsync", appear)
    with pytest.raises(OutputExists):
        write_file(target, b"mine", replace=False)
    assert target.read_bytes() == b"somebody else's"
    assert names(directory) == {"a"}


@pytest.mark.parametrize("call", ["write", "fsync", "link", "rename", "fchmod"])
def test_failure_at_any_step_leaves_everything_as_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = directory / "a"
    target.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.os, call, fail)
    if call == "link":
        # A named temporary file needs no link to replace another.
        monkeypatch.setattr(output.os, "rename", fail)
    with pytest.raises(OutputUnwritable, match="No space left"):
        write_file(target, b"new", replace=True)
    assert target.read_bytes() == b"old"
    assert names(directory) == {"a"}


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_nothing_but_regular_files_is_replaced(directory: Path, kind: str) -> None:
    target = directory / "a"
    if kind == "directory":
        target.mkdir()
    elif kind == "link":
        target.symlink_to("b")
    else:
        os.mkfifo(target)
    mode = target.lstat().st_mode
    for call in (
        lambda: write_file(target, b"x", replace=True),
        lambda: check_output(target, replace=True),
    ):
        with pytest.raises(OutputUnwritable):
            call()
    assert target.lstat().st_mode == mode
    assert names(directory) == {"a"}


def test_missing_directory_is_named(directory: Path) -> None:
    with pytest.raises(OutputUnwritable, match="missing: No such file"):
        write_file(directory / "missing" / "a", b"", replace=False)


def test_no_descriptor_is_left_open(directory: Path) -> None:
    before = os.listdir("/proc/self/fd")
    write_file(directory / "a", b"x", replace=False)
    with pytest.raises(OutputExists):
        write_file(directory / "a", b"x", replace=False)
    assert os.listdir("/proc/self/fd") == before
