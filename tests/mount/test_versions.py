"""Inode numbers and sizes in the FUSE view: the same over changes and restarts, and true."""

import mmap
import os
from functools import partial

import pytest

from tests.support.mounts import MountedVolume, wait_until
from tests.support.sites import Site


def test_inode_numbers_are_the_same_after_a_restart(site: Site) -> None:
    site.make_volume()
    site.encrypt("a", site.secret("a", 20))
    site.encrypt("sub/b", site.secret("b", 20))
    volume = site.mount()
    before = {name: (volume.path / name).stat().st_ino for name in ("a", "sub", "sub/b")}
    volume.umount()
    volume = site.mount()
    assert {name: (volume.path / name).stat().st_ino for name in before} == before
    assert len(set(before.values())) == 3


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


@pytest.mark.parametrize("view", ["fuse"])
@pytest.mark.parametrize("kind", ["bound", "bare"])
def test_an_open_file_has_the_size_of_its_version_also_if_the_one_before_was_just_looked_at(
    site: Site, kind: str
) -> None:
    site.make_volume("key")
    site.append_config("[cache]\nidle_s = 0\n")
    path = site.directory / "mnt" / "key"
    volume = None
    for number, size_bytes in enumerate((100, 3000, 50, 2000)):
        content = site.secret(f"version {number}", size_bytes)
        if kind == "bound":
            site.encrypt("key", content)
        else:
            beside = site.directory / "beside"
            beside.write_bytes(site.blob(content))
            beside.rename(site.source / "key.encrypted")
        volume = volume or site.mount()
        with path.open("rb") as file:
            assert os.fstat(file.fileno()).st_size == size_bytes
            with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
                assert mapped[:] == content
        wait_until(partial(is_wiped, volume), "it is wiped, and the kernel told of it")
        assert path.stat().st_size == size_bytes


def is_wiped(volume: MountedVolume) -> bool:
    return volume.status()["cached"] == []
