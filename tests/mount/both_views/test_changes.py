"""Files that change while they are mounted, and while they are open."""

import mmap
import os
from pathlib import Path

from tests.support.mounts import SEEN_S, wait_until
from tests.support.refusals import (
    BAD_MESSAGE,
    exit_code_of_mount,
    refusal_of,
    said_of_refused,
)
from tests.support.sites import Site


def wait_for_content(path: Path, content: bytes) -> None:
    """Wait until a file is there and has this content."""

    def is_there() -> bool:
        try:
            return path.read_bytes() == content
        except FileNotFoundError:
            return False

    wait_until(is_there, f"the new content of {path.name}", SEEN_S)


def test_added_changed_and_removed_files_are_seen_within_two_seconds(site: Site) -> None:
    site.make_volume()
    site.encrypt("first", site.secret("first", 20))
    volume = site.mount()
    assert volume.names() == ["first"]
    assert not (volume.path / "second").exists()

    second = site.secret("second", 30)
    site.encrypt("second", second)
    wait_for_content(volume.path / "second", second)
    wait_until(lambda: volume.names() == ["first", "second"], "it is listed", SEEN_S)

    changed = site.secret("changed", 4000)
    site.encrypt("second", changed)
    wait_for_content(volume.path / "second", changed)
    assert (volume.path / "second").stat().st_size == len(changed)

    (site.source / "second.encrypted").unlink()
    wait_until(lambda: not (volume.path / "second").exists(), "it is gone", SEEN_S)
    wait_until(lambda: volume.names() == ["first"], "it is not listed", SEEN_S)
    assert volume.status()["served"] == 1


def test_directories_that_come_and_go_are_seen_within_two_seconds(site: Site) -> None:
    site.make_volume()
    site.encrypt("first", site.secret("first", 20))
    volume = site.mount()

    deep = site.secret("deep", 30)
    ciphertext = site.encrypt("new/deep/key", deep)
    wait_for_content(volume.path / "new/deep/key", deep)

    later = site.secret("later", 30)
    site.encrypt("new/deep/later", later)
    wait_for_content(volume.path / "new/deep/later", later)

    ciphertext.unlink()
    (site.source / "new/deep/later.encrypted").unlink()
    wait_until(lambda: volume.names("new/deep") == [], "its files are gone", SEEN_S)
    (site.source / "new/deep").rmdir()
    (site.source / "new").rmdir()
    wait_until(lambda: volume.names() == ["first"], "the directory is gone", SEEN_S)


def test_a_name_may_change_from_file_to_directory_and_back(site: Site) -> None:
    site.make_volume()
    as_file, inside = site.secret("file", 20), site.secret("inside", 20)
    ciphertext = site.encrypt("name", as_file)
    volume = site.mount()
    path = volume.path / "name"
    assert path.read_bytes() == as_file

    ciphertext.unlink()
    inner = site.encrypt("name/inside", inside)
    wait_until(path.is_dir, "it is a directory", SEEN_S)
    wait_for_content(path / "inside", inside)

    inner.unlink()
    inner.parent.rmdir()
    site.encrypt("name", as_file)
    wait_until(path.is_file, "it is a file", SEEN_S)
    wait_for_content(path, as_file)


def test_a_link_in_the_source_that_leads_elsewhere_is_followed_anew(site: Site) -> None:
    site.make_volume("**")
    old, new = site.secret("old", 40), site.secret("new", 50)
    site.write("versions/1.encrypted", site.blob(old))
    site.write("versions/2.encrypted", site.blob(new))
    link = site.source / "current.encrypted"
    link.symlink_to("versions/1.encrypted")
    volume = site.mount()
    assert (volume.path / "current").read_bytes() == old
    beside = site.source / "current.new"
    beside.symlink_to("versions/2.encrypted")
    beside.rename(link)
    wait_for_content(volume.path / "current", new)


def test_an_open_file_keeps_its_version_and_a_new_open_gets_the_new_one(site: Site) -> None:
    site.make_volume()
    old, new = site.secret("old", 50_000), site.secret("new", 70_000)
    site.encrypt("key", old)
    volume = site.mount()
    path = volume.path / "key"
    with path.open("rb") as opened_before:
        assert opened_before.read(10) == old[:10]
        site.encrypt("key", new)
        wait_for_content(path, new)
        assert old[:10] + opened_before.read() == old
        assert os.fstat(opened_before.fileno()).st_size == len(old)
        assert path.stat().st_size == len(new)


def test_an_open_file_that_is_removed_is_readable_to_its_end(site: Site) -> None:
    site.make_volume()
    content = site.secret("removed", 50_000)
    ciphertext = site.encrypt("key", content)
    volume = site.mount()
    path = volume.path / "key"
    with path.open("rb") as opened:
        assert opened.read(10) == content[:10]
        ciphertext.unlink()
        wait_until(lambda: not path.exists(), "it is gone", SEEN_S)
        assert content[:10] + opened.read() == content


def test_two_open_versions_never_mix_in_reads_and_private_maps(site: Site) -> None:
    site.make_volume()
    size = 64 * 4096
    old, new = site.secret("old", size), site.secret("new", size)
    site.encrypt("key", old)
    volume = site.mount()
    path = volume.path / "key"
    old_file = path.open("rb")
    old_map = mmap.mmap(old_file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    # Pages that are touched now, and pages that are touched only after the rotation.
    assert old_map[: size // 4] == old[: size // 4]
    site.encrypt("key", new)
    wait_for_content(path, new)
    new_file = path.open("rb")
    new_map = mmap.mmap(new_file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    try:
        for start in range(0, size, size // 16):
            end = start + size // 16
            assert new_map[start:end] == new[start:end]
            assert os.pread(old_file.fileno(), end - start, start) == old[start:end]
            assert old_map[start:end] == old[start:end]
            assert os.pread(new_file.fileno(), end - start, start) == new[start:end]
        assert os.fstat(old_file.fileno()).st_ino != os.fstat(new_file.fileno()).st_ino
    finally:
        for opened in (old_map, new_map, old_file, new_file):
            opened.close()


def test_a_swapped_or_moved_file_is_refused_until_it_is_put_right(site: Site, view: str) -> None:
    site.make_volume()
    site.encrypt("one", site.secret("one", 40))
    two = site.secret("two", 40)
    ciphertext_two = site.encrypt("two", two)
    content_of_one = (site.source / "one.encrypted").read_bytes()
    site.write("one.encrypted", ciphertext_two.read_bytes())
    site.write("sub/moved.encrypted", content_of_one)
    volume = site.mount(exit_code=exit_code_of_mount(view))
    refused = said_of_refused(view, fuse=BAD_MESSAGE), "ContextMismatch"
    assert refusal_of(volume, "one") == refused
    assert refusal_of(volume, "sub/moved") == refused
    assert (volume.path / "two").read_bytes() == two
    assert set(volume.failing()) == {"one", "sub/moved"}

    site.write("one.encrypted", content_of_one)
    (site.source / "sub/moved.encrypted").unlink()
    wait_for_content(volume.path / "one", site.secret("one", 40))
    wait_until(lambda: volume.failing() == {}, "nothing fails any more", SEEN_S)


def test_files_swapped_while_mounted_are_refused(site: Site, view: str) -> None:
    site.make_volume()
    contents = {name: site.secret(name, 40) for name in ("one", "two")}
    one, two = (site.encrypt(name, content) for name, content in contents.items())
    volume = site.mount()
    assert {name: (volume.path / name).read_bytes() for name in contents} == contents
    beside = site.source / "beside"
    one.rename(beside)
    two.rename(one)
    beside.rename(two)
    refused = said_of_refused(view, fuse=BAD_MESSAGE), "ContextMismatch"
    for name in contents:
        wait_until(lambda name=name: refusal_of(volume, name) == refused, "it is refused", SEEN_S)


def test_a_file_written_in_place_by_halves_is_never_served_by_halves(
    site: Site, view: str, tmp_path: Path
) -> None:
    site.make_volume()
    old, new = site.secret("old", 30_000), site.secret("new", 30_000)
    ciphertext = site.encrypt("key", old)
    old_whole = ciphertext.read_bytes()
    whole = site.encrypt("key", new).read_bytes()
    ciphertext.write_bytes(old_whole)
    volume = site.mount()
    path = volume.path / "key"
    assert path.read_bytes() == old

    def refusal() -> str:
        """What is said of the file; if nothing is, it was served whole."""
        try:
            assert path.read_bytes() in (old, new)
        except OSError as error:
            return os.strerror(error.errno or 0)
        return ""

    ciphertext.write_bytes(whole[: len(whole) // 2])
    refused = said_of_refused(view, fuse=BAD_MESSAGE)
    wait_until(lambda: refusal() == refused, "half a file is refused", SEEN_S)
    assert "key" in volume.failing()
    ciphertext.write_bytes(whole)
    wait_until(lambda: refusal() == "", "the whole file is served", SEEN_S)
    assert path.read_bytes() == new
    assert volume.failing() == {}
