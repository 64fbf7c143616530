"""Mounting, locking, and unmounting in every way: in the end nothing is left."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import run_kmsfs
from tests.support.mounts import (
    SEEN_S,
    MountedVolume,
    children_of,
    processes_of,
    strerror_of_cat,
    wait_gone,
    wait_until,
)
from tests.support.refusals import NO_KEY, said_of_refused
from tests.support.sites import Site


@pytest.fixture
def content(site: Site) -> bytes:
    """What is in the file that is `served`."""
    return site.secret("key", 5000)


@pytest.fixture
def served(site: Site, content: bytes) -> MountedVolume:
    """A mount with one file, `key`, that has been read."""
    site.make_volume()
    site.encrypt("key", content)
    volume = site.mount()
    assert (volume.path / "key").read_bytes() == content
    return volume


def assert_all_end(pids: list[int], volume: MountedVolume) -> None:
    """Every process of a mount ends, and its mountpoint is an empty directory again."""
    for pid in pids:
        wait_gone(pid)
    assert volume.mount is None
    assert os.listdir(volume.path) == []


def test_lock_takes_every_plaintext_away_and_unlock_gives_it_back(
    site: Site, view: str, served: MountedVolume, content: bytes
) -> None:
    served.kmsfs("lock", served.path)
    assert strerror_of_cat(served.path / "key") == said_of_refused(view, fuse=NO_KEY)
    assert served.names() == {"fuse": ["key"], "ramfs": []}[view]
    status = served.status()
    assert (status["locked"], status["cached"], status["cached_bytes"]) == (True, [], 0)
    served.kmsfs("unlock", served.path)
    assert (served.path / "key").read_bytes() == content
    assert served.names() == ["key"]
    assert served.status()["locked"] is False


def test_locking_twice_and_unlocking_twice_is_harmless(
    served: MountedVolume, content: bytes
) -> None:
    for _ in range(2):
        served.kmsfs("lock", served.path)
    for _ in range(2):
        served.kmsfs("unlock", served.path)
    assert (served.path / "key").read_bytes() == content


def test_a_change_made_while_locked_shows_after_unlock(
    site: Site, view: str, served: MountedVolume
) -> None:
    served.kmsfs("lock", served.path)
    new, added = site.secret("new", 100), site.secret("added", 100)
    site.encrypt("key", new)
    site.encrypt("added", added)
    assert strerror_of_cat(served.path / "key") == said_of_refused(view, fuse=NO_KEY)
    served.kmsfs("unlock", served.path)
    assert (served.path / "key").read_bytes() == new
    assert (served.path / "added").read_bytes() == added


def test_two_mounts_of_one_volume_are_apart(
    site: Site, view: str, served: MountedVolume, content: bytes, tmp_path: Path
) -> None:
    other = site.mount(path=tmp_path / "other")
    served.kmsfs("lock", served.path)
    assert (other.path / "key").read_bytes() == content
    assert strerror_of_cat(served.path / "key") == said_of_refused(view, fuse=NO_KEY)
    everything = run_kmsfs(["status"], env=site.env).output
    assert str(served.path) in everything
    assert str(other.path) in everything


def test_mount_options_do_what_the_options_of_the_same_name_do(site: Site, view: str) -> None:
    content = site.secret("key", 100)
    site.encrypt_with_aws_cli("key.encrypted", content)
    volume = site.mount(
        "-o",
        f"ro,nofail,_netdev,x-systemd.automount,key_id={site.key_arn},mode=0440,view={view}",
        "-o",
        "group=daemon",
        key=None,
    )
    info = (volume.path / "key").stat()
    assert (info.st_mode & 0o777, (volume.path / "key").group()) == (0o440, "daemon")
    assert (volume.path / "key").read_bytes() == content


def test_background_mount_keeps_no_terminal_and_no_pipe_of_its_caller(
    served: MountedVolume,
) -> None:
    # Mounting would not have returned if a child kept the pipes.
    launcher_pid = served.launcher_pid
    for pid in (launcher_pid, *children_of(launcher_pid)):
        targets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)}
        assert targets == {"/dev/null"}
    assert os.getsid(launcher_pid) == launcher_pid


def test_mounting_over_a_live_mount_is_refused(served: MountedVolume, content: bytes) -> None:
    for view in ("fuse", "ramfs"):
        done = served.kmsfs("mount", served.source, served.path, "--view", view, exit_code=7)
        assert f"kmsfs: hint: kmsfs umount {served.path}" in done.stderr
    assert (served.path / "key").read_bytes() == content


def test_umount_command_returns_when_every_process_has_ended(served: MountedVolume) -> None:
    pids = processes_of(served.path)
    assert len(pids) >= 3
    served.umount()
    for pid in pids:
        wait_gone(pid, timeout_s=1.0)
    assert_all_end(pids, served)


def test_the_same_mountpoint_can_be_mounted_on_again(
    site: Site, served: MountedVolume, content: bytes
) -> None:
    for _ in range(2):
        served.umount()
        assert (site.mount().path / "key").read_bytes() == content


def test_plain_umount_ends_everything(served: MountedVolume) -> None:
    pids = processes_of(served.path)
    subprocess.run(["umount", served.path], check=True)
    assert_all_end(pids, served)


def test_lazy_umount_ends_everything_at_the_last_close(
    served: MountedVolume, content: bytes
) -> None:
    pids = processes_of(served.path)
    with (served.path / "key").open("rb") as opened:
        assert opened.read(10) == content[:10]
        subprocess.run(["umount", "-l", served.path], check=True)
        assert os.listdir(served.path) == []
        assert content[:10] + opened.read() == content
    assert_all_end(pids, served)


def test_sigterm_unmounts_and_ends_everything(served: MountedVolume) -> None:
    pids = processes_of(served.path)
    os.kill(served.launcher_pid, signal.SIGTERM)
    assert_all_end(pids, served)


def test_sigterm_ends_everything_even_when_busy(
    view: str, served: MountedVolume, content: bytes
) -> None:
    pids = processes_of(served.path)
    with (served.path / "key").open("rb", buffering=0) as opened:
        os.kill(served.launcher_pid, signal.SIGTERM)
        assert_all_end(pids, served)
        if view == "fuse":
            with pytest.raises(OSError, match=r"not connected|abort"):
                opened.read()
        else:
            # A reader never sees zeros: it has the file, until it closes it.
            assert opened.read() == content


def test_busy_mount_is_refused_and_says_who_holds_it(served: MountedVolume, content: bytes) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(1, flush=True); input()"]
        + [str(served.path / "key")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = served.kmsfs("umount", served.path, exit_code=7)
        # A ramfs has the file in the directory of its set.
        held = rf"\(pid {holder.pid}\) with {re.escape(str(served.path))}/(\.\.[^/]+/)?key open"
        assert re.search(held, done.stderr)
        assert "kmsfs: hint: " in done.stderr
    finally:
        holder.communicate(b"\n")
    assert (served.path / "key").read_bytes() == content


def test_a_mount_that_refused_to_be_unmounted_still_follows_its_source(
    site: Site, served: MountedVolume
) -> None:
    with (served.path / "key").open("rb"):
        served.kmsfs("umount", served.path, exit_code=7)
    new = site.secret("new", 300)
    site.encrypt("key", new)
    wait_until(lambda: (served.path / "key").read_bytes() == new, "the new content", SEEN_S)
