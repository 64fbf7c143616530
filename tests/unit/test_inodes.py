"""Inode numbers: from the path, one version each, collisions told apart."""

import pytest

from kmsfs.formats.detect import Format
from kmsfs.store.source import SourceDirectory, SourceFile
from kmsfs.views import inodes as inodes_module
from kmsfs.views.inodes import ROOT_NUMBER, InodeTable, same_version

ROOT = SourceDirectory(path="", mtime_ns=0)


def file(path: str, version: int = 1, source_path: str | None = None) -> SourceFile:
    """A file of some version."""
    return SourceFile(
        path=path,
        source_path=source_path or path + ".kms",
        version=(1, 1, 1, version, version),
        format=Format.KMS_BLOB,
        size_bytes=1,
        size_exact=True,
        key="k",
        bound=False,
        suffix_taken=True,
    )


@pytest.fixture
def table() -> InodeTable:
    """A table that knows the root only."""
    return InodeTable(ROOT)


def test_numbers_are_the_same_after_a_restart_and_differ_by_path(table: InodeTable) -> None:
    paths = [f"dir/{n}" for n in range(500)]
    numbers = [table.assign(file(path)).number for path in paths]
    assert numbers == [InodeTable(ROOT).assign(file(path)).number for path in paths]
    assert len(set(numbers)) == len(paths)
    assert all(ROOT_NUMBER < number < 2**63 for number in numbers)


def test_a_file_and_a_directory_of_one_path_have_numbers_of_their_own(table: InodeTable) -> None:
    assert table.assign(file("a")).number != table.assign(SourceDirectory("a", 0)).number


def test_the_root_is_always_known(table: InodeTable) -> None:
    newer = SourceDirectory(path="", mtime_ns=9)
    assert table.assign(newer).number == ROOT_NUMBER
    table.forget(ROOT_NUMBER, 100)
    root = table.get(ROOT_NUMBER)
    assert root is not None
    assert root.node == newer


def test_a_newer_version_takes_the_paths_number_while_nothing_is_open(table: InodeTable) -> None:
    inode = table.assign(file("a", 1))
    assert table.assign(file("a", 2)) is inode
    assert inode.node == file("a", 2)


def test_while_an_older_version_is_open_a_newer_one_has_another_number(table: InodeTable) -> None:
    older = table.assign(file("a", 1))
    older.lookups, older.opens = 1, 1
    newer = table.assign(file("a", 2))
    newer.lookups, newer.opens = 1, 1
    newest = table.assign(file("a", 3))
    newest.lookups = 1
    assert len({older.number, newer.number, newest.number}) == 3
    assert table.assign(file("a", 1)) is older
    assert table.assign(file("a", 2)) is newer
    assert sorted(table.numbers_of("a")) == sorted({older.number, newer.number, newest.number})
    assert sorted(table.files_known()) == sorted(table.numbers_of("a"))


def test_the_paths_own_number_returns_once_the_older_version_is_closed(table: InodeTable) -> None:
    older = table.assign(file("a", 1))
    older.lookups, older.opens = 1, 1
    newer = table.assign(file("a", 2))
    newer.lookups = 1
    older.opens = 0
    table.forget(older.number, 1)
    assert table.get(older.number) is None
    assert table.assign(file("a", 3)).number == older.number
    assert table.get(newer.number) is newer


def test_the_same_times_under_another_name_are_another_version(table: InodeTable) -> None:
    older = table.assign(file("a", 1))
    older.opens = 1
    assert not same_version(older, file("a", 1, "a.encrypted"))
    assert table.assign(file("a", 1, "a.encrypted")) is not older
    assert not same_version(older, SourceDirectory("a", 0))


def test_an_inode_lives_until_kernel_and_descriptors_let_go(table: InodeTable) -> None:
    inode = table.assign(file("a"))
    inode.lookups, inode.opens = 3, 1
    table.forget(inode.number, 2)
    assert table.get(inode.number) is inode
    table.forget(inode.number, 1)
    assert table.get(inode.number) is inode
    inode.opens = 0
    table.drop_unreferenced(inode)
    assert table.get(inode.number) is None
    table.forget(inode.number, 1)


def test_colliding_paths_get_numbers_of_their_own(
    table: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_attempt(_path: str, _kind: str, attempt: int) -> int:
        return ROOT_NUMBER + attempt

    monkeypatch.setattr(inodes_module, "_number", by_attempt)
    one, two = table.assign(file("one")), table.assign(file("two"))
    assert (one.number, two.number) == (2, 3)
    assert table.assign(file("two")) is two
    assert table.numbers_of("two") == [3]
    assert table.numbers_of("one") == [2]


def test_too_many_open_versions_are_an_error(
    table: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes_module, "_MAX_ATTEMPTS", 3)
    for version in range(3):
        table.assign(file("a", version)).opens = 1
    with pytest.raises(OverflowError, match="3 versions of a"):
        table.assign(file("a", 9))
