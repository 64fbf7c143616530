"""Files that change while they are mounted, and while they are open."""

import mmap
import os
from pathlib import Path

from tests.support.mounts import wait_until
from tests.support.sites import Site

# A change in the source is seen within two seconds.
_SEEN_S = 2.0


def test_added_changed_and_removed_files_are_seen_within_two_seconds(site: Site) -> None:
    site.make_volume()
    site.encrypt("first", site.secret("first", 20))
    volume = site.mount()
    assert os.listdir(volume.path) == ["first"]
    assert not (volume.path / "second").exists()

    second = site.secret("second", 30)
    site.encrypt("second", second)
    wait_until((volume.path / "second").exists, "the new file shows", _SEEN_S)
    assert (volume.path / "second").read_bytes() == second

    changed = site.secret("changed", 4000)
    site.encrypt("second", changed)
    wait_until(lambda: (volume.path / "second").read_bytes() == changed, "the new content", _SEEN_S)
    assert (volume.path / "second").stat().st_size == len(changed)

    (site.source / "second.encrypted").unlink()
    wait_until(lambda: not (volume.path / "second").exists(), "it is gone", _SEEN_S)
    wait_until(lambda: os.listdir(volume.path) == ["first"], "it is not listed", _SEEN_S)


def test_an_open_file_keeps_its_version_and_a_new_open_gets_the_new_one(site: Site) -> None:
    site.make_volume()
    old, new = site.secret("old", 50_000), site.secret("new", 70_000)
    site.encrypt("key", old)
    volume = site.mount()
    path = volume.path / "key"
    with path.open("rb") as opened_before:
        assert opened_before.read(10) == old[:10]
        site.encrypt("key", new)
        assert path.read_bytes() == new
        assert old[:10] + opened_before.read() == old
        assert os.fstat(opened_before.fileno()).st_size == len(old)
        assert path.stat().st_size == len(new)


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


def test_the_paths_own_inode_number_returns_after_the_old_version_is_closed(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("old", 100))
    volume = site.mount()
    path = volume.path / "key"
    own_number = path.stat().st_ino
    with path.open("rb"):
        site.encrypt("key", site.secret("new", 100))
        with path.open("rb") as newer:
            assert os.fstat(newer.fileno()).st_ino != own_number
    wait_until(lambda: path.stat().st_ino == own_number, "its own number returns", 4.0)


def test_a_replaced_file_keeps_its_inode_number_while_nobody_has_it_open(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("old", 100))
    volume = site.mount()
    path = volume.path / "key"
    before = path.stat().st_ino
    path.read_bytes()
    new = site.secret("new", 200)
    site.encrypt("key", new)
    assert path.read_bytes() == new
    assert path.stat().st_ino == before


def test_a_swapped_or_moved_file_is_refused(site: Site) -> None:
    site.make_volume()
    site.encrypt("one", site.secret("one", 40))
    site.encrypt("two", site.secret("two", 40))
    one, two = site.source / "one.encrypted", site.source / "two.encrypted"
    content_of_one = one.read_bytes()
    one.write_bytes(two.read_bytes())
    (site.source / "moved.encrypted").write_bytes(content_of_one)
    volume = site.mount()
    assert site.error_of_cat(volume.path / "one") == "Bad message"
    assert site.error_of_cat(volume.path / "moved") == "Bad message"
    assert site.error_of_cat(volume.path / "two") == ""
    reasons = {item["path"]: item["reason"] for item in volume.status()["failing"]}
    assert set(reasons) == {"one", "moved"}
    assert all(reason.startswith("ContextMismatch") for reason in reasons.values())


def test_a_file_written_in_place_by_halves_is_never_served_by_halves(
    site: Site, tmp_path: Path
) -> None:
    site.make_volume()
    old, new = site.secret("old", 30_000), site.secret("new", 30_000)
    site.encrypt("key", old)
    volume = site.mount()
    path = volume.path / "key"
    assert path.read_bytes() == old
    ciphertext = site.source / "key.encrypted"
    scratch = tmp_path / "key.encrypted"
    scratch.write_bytes(ciphertext.read_bytes())
    site.encrypt("key", new)
    whole = ciphertext.read_bytes()
    ciphertext.write_bytes(whole[: len(whole) // 2])
    assert site.error_of_cat(path) == "Bad message"
    ciphertext.write_bytes(whole)
    wait_until(lambda: site.error_of_cat(path) == "", "the whole file is served", _SEEN_S)
    assert path.read_bytes() == new
