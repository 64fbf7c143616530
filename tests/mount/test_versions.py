"""Inode numbers in the FUSE view: the same over changes and restarts."""

import os

from tests.support.mounts import wait_until
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
