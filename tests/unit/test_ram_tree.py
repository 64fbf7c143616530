"""What lies in the ramfs: published in one step, wiped when nobody reads; on a real ramfs."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs import libc
from kmsfs.errors import MountpointUnusable
from kmsfs.store.policy import Permissions
from kmsfs.views import mountpoint as mounts
from kmsfs.views import ram_tree
from kmsfs.views.ram_tree import Generation, RamTree

FILE = Permissions(0, 0, 0o440)
DIRECTORY = Permissions(0, 0, 0o555)


@pytest.fixture
def root(mountable: None, tmp_path: Path) -> Iterator[Path]:
    """An empty ramfs."""
    path = tmp_path / "ram"
    path.mkdir()
    libc.mount("test", str(path), "ramfs", 0, "mode=0700")
    yield path
    mounts.unmount(str(path))


@pytest.fixture
def tree(root: Path) -> Iterator[RamTree]:
    """The tree in it; the signal of a broken lease is ignored, as by those who use one."""
    ram_tree.ignore_lease_breaks()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    made = RamTree(fd)
    os.close(fd)
    yield made
    made.close()


def write(generation: Generation, path: str, content: bytes) -> None:
    fd = generation.create(path, FILE)
    os.write(fd, content)
    generation.finish(fd, FILE, 1_000_000_000)
    os.close(fd)


def publish(tree: RamTree, files: dict[str, bytes], linked: tuple[str, ...] = ()) -> None:
    """A set of files: new ones, and those taken over from the set before."""
    generation = tree.begin()
    for path, content in files.items():
        write(generation, path, content)
    current_fd = tree.open_current()
    for path in linked:
        assert current_fd is not None
        generation.link(path, current_fd)
    if current_fd is not None:
        os.close(current_fd)
    tree.publish(generation, DIRECTORY, b"state")
    generation.close()


def all_below(root: Path) -> list[str]:
    """Every name in a tree."""
    return sorted(
        os.path.relpath(os.path.join(place, name), root)
        for place, directories, files in os.walk(root)
        for name in (*directories, *files)
    )


def test_a_file_has_no_mode_before_it_is_whole(tree: RamTree, root: Path) -> None:
    generation = tree.begin()
    fd = generation.create("sub/file", Permissions(1, 2, 0o644))
    path = root / generation.name / "sub/file"
    info = path.stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0, 1, 2)
    assert (root / generation.name).stat().st_mode & 0o777 == 0o700
    generation.finish(fd, Permissions(1, 2, 0o644), 5_000_000_000)
    info = path.stat()
    assert (info.st_mode & 0o7777, info.st_mtime) == (0o644, 5)
    os.close(fd)
    tree.discard(generation)


def test_published_files_are_seen_all_at_once_and_the_ones_before_stay_until_retired(
    tree: RamTree, root: Path
) -> None:
    publish(tree, {"a": b"1", "d/b": b"1"})
    before = os.open(root / "..data", os.O_RDONLY | os.O_DIRECTORY)
    publish(tree, {"a": b"2", "c": b"2"})
    assert [(root / name).read_bytes() for name in ("a", "c")] == [b"2", b"2"]
    assert not (root / "d").exists()
    with open(os.open("d/b", os.O_RDONLY, dir_fd=before), "rb") as file:
        assert file.read() == b"1"
    tree.retire()
    with pytest.raises(FileNotFoundError):
        os.open("d/b", os.O_RDONLY, dir_fd=before)
    os.close(before)
    assert tree.wipe_old() == []
    assert len([name for name in os.listdir(root) if name.startswith("..20")]) == 1


def test_a_linked_file_is_the_same_and_survives_the_set_it_came_from(
    tree: RamTree, root: Path
) -> None:
    publish(tree, {"kept": b"kept", "gone": b"gone"})
    inode = (root / "kept").stat().st_ino
    publish(tree, {}, linked=("kept",))
    tree.retire()
    assert tree.wipe_old() == []
    assert ((root / "kept").read_bytes(), (root / "kept").stat().st_ino) == (b"kept", inode)
    assert (root / "kept").stat().st_nlink == 1


def test_an_old_file_that_is_open_or_mapped_is_not_touched(tree: RamTree, root: Path) -> None:
    publish(tree, {"db/opened": b"opened" * 1000, "mapped": b"mapped" * 1000})
    opened = (root / "db/opened").open("rb")
    fd = os.open(root / "mapped", os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    os.close(fd)
    publish(tree, {})
    tree.retire()
    held = tree.wipe_old()
    assert sorted(file.path for file in held) == ["db/opened", "mapped"]
    for file in held:
        assert (root / file.old_path).exists()
    assert (root / "..old").stat().st_mode & 0o777 == 0o700
    assert (opened.read(), mapped[:]) == (b"opened" * 1000, b"mapped" * 1000)
    opened.close()
    assert [file.path for file in tree.wipe_old()] == ["mapped"]
    mapped.close()
    assert tree.wipe_old() == []
    assert not (root / "..old").exists()


def test_a_file_is_zeros_before_it_is_nothing(
    tree: RamTree, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3_000_001)
    publish(tree, {"file": content})
    seen = []
    really_truncate = os.ftruncate

    def truncate(fd: int, size_bytes: int) -> None:
        seen.append(os.pread(fd, len(content) + 1, 0))
        really_truncate(fd, size_bytes)

    monkeypatch.setattr(os, "ftruncate", truncate)
    tree.empty()
    assert tree.wipe_old() == []
    assert bytes(len(content)) in seen
    assert os.listdir(root) == []


@pytest.mark.parametrize("published", [True, False])
def test_what_a_killed_process_left_is_found_and_wiped(
    tree: RamTree, root: Path, published: bool
) -> None:
    publish(tree, {"kept": b"kept", "old": b"old"})
    publish(tree, {"new": b"new"}, linked=("kept",))
    unfinished = tree.begin()
    write(unfinished, "deep/er/half", b"ha")
    half_made = unfinished.create("empty", FILE)
    if not published:
        os.symlink(unfinished.name, root / "..data_next")
    tree.close()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    again = RamTree(fd)
    os.close(fd)
    assert again.read_state() == b"state"
    again.retire()
    assert [file.path for file in again.wipe_old()] == ["empty"]
    os.close(half_made)
    unfinished.close()
    assert again.wipe_old() == []
    shown = {path for path in all_below(root) if not path.startswith("..old")}
    assert {"kept", "new"} <= shown
    assert len([path for path in os.listdir(root) if path.startswith("..20")]) == 1
    again.empty()
    again.close()


def test_two_cannot_fill_one_ramfs(tree: RamTree, root: Path) -> None:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(MountpointUnusable, match="another process"):
        RamTree(fd)
    os.close(fd)


@pytest.mark.parametrize("make", ["file", "link", "directory"])
def test_files_of_others_are_refused(root: Path, make: str) -> None:
    match make:
        case "file":
            (root / "theirs").write_text("x")
        case "link":
            (root / "theirs").symlink_to("..data/other")
        case _:
            (root / "..2026").mkdir()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(MountpointUnusable, match="not of kmsfs"):
        RamTree(fd)
    os.close(fd)


def test_a_symbolic_link_in_place_of_a_set_is_not_followed(tree: RamTree, root: Path) -> None:
    (root / "..data").symlink_to("/etc")
    assert tree.open_current() is None
    assert tree.read_state() is None
    tree.empty()
    assert tree.wipe_old() == []
    assert Path("/etc/passwd").exists()
