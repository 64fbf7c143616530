"""A source on a network filesystem whose server goes away, and comes back."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kmsfs.store.known import METADATA_DEADLINE_S
from tests.support.mounts import MountedVolume, processes_of, strerror_of_cat, wait_gone, wait_until
from tests.support.sites import Site
from tests.support.stalling_filesystem import StallingFilesystem, stalling_filesystem

_TIMED_OUT = "Connection timed out"

# The default deadline of an open is 8 s; more than these is a hang, not a slow machine.
_OPEN_S = 12.0
_METADATA_S = METADATA_DEADLINE_S + 5.0
_RECOVERED_S = 15.0


@dataclass
class Stalling:
    """A mount whose source stalls, and the plaintexts in it."""

    volume: MountedVolume
    filesystem: StallingFilesystem
    site: Site
    plaintexts: dict[str, bytes]


@pytest.fixture
def view() -> str:
    """Only here a request for metadata reaches the source."""
    return "fuse"


@pytest.fixture
def stalling(site: Site, tmp_path: Path) -> Iterator[Stalling]:
    """Three files that can be served, of which nothing is known to the mount yet."""
    backing = site.source
    site.make_volume()
    plaintexts = {name: site.secret(name, 3000) for name in ("read", "seen", "dir/inner")}
    for name, plaintext in plaintexts.items():
        site.encrypt(name, plaintext)
    remote = tmp_path / "remote"
    remote.mkdir()
    with stalling_filesystem(backing, remote) as filesystem:
        path = tmp_path / "mnt"
        path.mkdir()
        volume = site.mounter.mount(remote, path)
        try:
            yield Stalling(volume, filesystem, site, plaintexts)
        finally:
            filesystem.go_on()
            assert site.mounter.clean_up() == []


def timed(code: str, path: Path) -> tuple[str, float]:
    """Do something with a path in a process of its own; what it printed, and how long it took."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys; path = sys.argv[1]; {code}", path],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip(), time.monotonic() - started


def test_what_was_seen_before_is_answered_while_the_source_stalls(stalling: Stalling) -> None:
    path = stalling.volume.path
    assert sorted(os.listdir(path)) == ["dir", "read", "seen"]
    assert os.listdir(path / "dir") == ["inner"]
    assert (path / "read").read_bytes() == stalling.plaintexts["read"]
    before = {name: (path / name).stat() for name in ("read", "seen", "dir", "dir/inner")}
    stalling.filesystem.stall()
    for name, info in before.items():
        said, seconds = timed("i = os.stat(path); print(i.st_ino, i.st_size)", path / name)
        assert said == f"{info.st_ino} {info.st_size}"
        assert seconds < _METADATA_S
    said, seconds = timed("print(sorted(os.listdir(path)))", path)
    assert said == "['dir', 'read', 'seen']"
    assert seconds < _METADATA_S
    # Nobody waits a second time for a source that is known to stall.
    started = time.monotonic()
    for _ in range(3):
        wait_until_forgotten(path / "seen")
    assert time.monotonic() - started < 3 * _METADATA_S


def test_status_answers_while_the_source_stalls(stalling: Stalling) -> None:
    stalling.filesystem.stall()
    status = stalling.volume.status()
    assert (status["served"], status["ignored"]) == (
        0,
        [{"path": "", "reason": "the source does not answer", "hint": ""}],
    )


def wait_until_forgotten(path: Path) -> None:
    """Have the kernel ask again: its own copy of attributes is good for a second."""
    started = time.monotonic()
    wait_until(lambda: time.monotonic() - started > 1.1, "the kernel's copy is old")
    path.stat()


def test_opens_and_new_names_end_with_an_errno_while_the_source_stalls(
    stalling: Stalling,
) -> None:
    path = stalling.volume.path
    assert sorted(os.listdir(path)) == ["dir", "read", "seen"]
    stalling.filesystem.stall()
    started = time.monotonic()
    assert strerror_of_cat(path / "seen") == _TIMED_OUT
    assert time.monotonic() - started < _OPEN_S
    started = time.monotonic()
    assert strerror_of_cat(path / "dir/inner") == _TIMED_OUT
    assert time.monotonic() - started < _METADATA_S


def test_a_hundred_opens_that_hang_keep_nobody_from_what_is_known(stalling: Stalling) -> None:
    path = stalling.volume.path
    size = (path / "seen").stat().st_size
    stalling.filesystem.stall()
    readers = [
        subprocess.Popen(["cat", path / "seen"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(100)
    ]
    try:
        said, seconds = timed("print(os.stat(path).st_size)", path / "seen")
        assert (said, seconds < _METADATA_S) == (str(size), True)
        assert os.statvfs(path).f_namemax == 255
    finally:
        for reader in readers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                reader.wait(_OPEN_S)
    assert {reader.returncode for reader in readers} == {1}
    for reader in readers:
        assert reader.stderr is not None
        reader.stderr.close()


def test_other_mounts_are_unharmed_and_it_recovers_by_itself(
    stalling: Stalling, tmp_path: Path
) -> None:
    path, site = stalling.volume.path, stalling.site
    other = site.mount(path=tmp_path / "other")
    assert (path / "read").read_bytes() == stalling.plaintexts["read"]
    stalling.filesystem.stall()
    assert strerror_of_cat(path / "read") == _TIMED_OUT
    assert (other.path / "dir/inner").read_bytes() == stalling.plaintexts["dir/inner"]
    new = site.secret("new", 4000)
    site.encrypt("read", new)
    stalling.filesystem.go_on()
    wait_until(
        lambda: strerror_of_cat(path / "read") == "" and (path / "read").read_bytes() == new,
        "the new version is read",
        _RECOVERED_S,
    )
    assert (path / "dir/inner").read_bytes() == stalling.plaintexts["dir/inner"]
    assert (path / "read").stat().st_size == 4000


def test_it_can_be_unmounted_while_the_source_stalls_and_ends_when_that_lets_go(
    stalling: Stalling,
) -> None:
    (stalling.volume.path / "seen").stat()
    stalling.filesystem.stall()
    assert strerror_of_cat(stalling.volume.path / "seen") == _TIMED_OUT
    pids = processes_of(stalling.volume.path)
    done = stalling.volume.kmsfs("umount", stalling.volume.path, exit_code=7)
    assert "its source does not answer" in done.stderr
    assert os.listdir(stalling.volume.path) == []
    # The kernel keeps a process for as long as one of its requests is with such a filesystem.
    stalling.filesystem.go_on()
    for pid in pids:
        wait_gone(pid)
