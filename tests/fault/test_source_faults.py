"""What a source may hold and do: each thing has its answer, and no other file is harmed by it."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.refusals import ABSENT, BAD_MESSAGE, exit_code_of_mount, said_of_refused
from tests.support.sites import StrictSite

# Two looks at the source, and what a ramfs takes to be filled; more than this is a hang.
_SEEN_S = 10.0

_DEPTH = 60


@pytest.fixture(params=["fuse", "ramfs"])
def view(request: pytest.FixtureRequest) -> str:
    """Every fault is made in either view."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def good(strict_site: StrictSite) -> bytes:
    """What is in the files `good` and `dir/good`, which no fault may touch."""
    plaintext = strict_site.secret("good", 64)
    for name in ("good.encrypted", "dir/good.encrypted"):
        strict_site.write(name, strict_site.blob(plaintext))
    return plaintext


def assert_unharmed(volume: MountedVolume, good: bytes) -> None:
    """The good files are read, by opens that take part in everything: nothing hangs."""
    assert (volume.path / "good").read_bytes() == good
    assert (volume.path / "dir/good").read_bytes() == good


def reasons(volume: MountedVolume) -> dict[str, str]:
    """Why status says that names of the source are not served."""
    return {item["path"]: item["reason"] for item in volume.status()["ignored"]}


def make_links(source: Path, outside: Path) -> None:
    (source / "out.encrypted").symlink_to(outside)
    (source / "up.encrypted").symlink_to("../outside")
    (source / "proc.encrypted").symlink_to("/proc/self/environ")
    (source / "self.encrypted").symlink_to("self.encrypted")
    (source / "ping.encrypted").symlink_to("pong.encrypted")
    (source / "pong.encrypted").symlink_to("ping.encrypted")
    (source / "dangling.encrypted").symlink_to("nowhere")
    (source / "dir/back").symlink_to("..")
    for number in range(50):
        (source / f"chain-{number}.encrypted").symlink_to(f"chain-{number + 1}.encrypted")


def test_links_that_lead_out_or_in_circles_are_absent(
    strict_site: StrictSite, good: bytes, tmp_path: Path
) -> None:
    outside = tmp_path / "site" / "outside"
    outside.write_bytes(strict_site.blob(strict_site.secret("outside", 20)))
    make_links(strict_site.source, outside)
    volume = strict_site.mount()
    for name in ("out", "up", "proc", "self", "ping", "pong", "dangling", "chain-0", "dir/back/x"):
        assert strerror_of_cat(volume.path / name) == ABSENT
    assert volume.names() == ["dir", "good"]
    told = reasons(volume)
    assert "Invalid cross-device link" in told["out.encrypted"]
    assert "Too many levels of symbolic links" in told["self.encrypted"]
    assert "No such file or directory" in told["dangling.encrypted"]
    assert "leads back" in told["dir/back"]
    assert_unharmed(volume, good)


def test_what_is_no_file_is_absent_and_holds_nobody_up(
    strict_site: StrictSite, good: bytes, public_directory: Path
) -> None:
    source = strict_site.source
    os.mkfifo(source / "fifo.encrypted")
    os.mknod(source / "zero.encrypted", 0o20666, os.makedev(1, 5))
    os.mknod(source / "block.encrypted", 0o60666, os.makedev(7, 99))
    with socket.socket(socket.AF_UNIX) as listener:
        # Paths of sockets are short.
        short = public_directory / "s"
        short.symlink_to(source)
        listener.bind(str(short / "socket.encrypted"))
        volume = strict_site.mount()
        for name in ("fifo", "zero", "block", "socket"):
            assert strerror_of_cat(volume.path / name) == ABSENT
            assert reasons(volume)[f"{name}.encrypted"] == "not a regular file"
        assert_unharmed(volume, good)


@pytest.fixture
def sparse(strict_site: StrictSite) -> Iterator[list[str]]:
    """Files of a terabyte. In the end they are small, as what a test leaves is looked through."""
    site = strict_site
    site.encrypt("message", site.secret("message", 10))
    site.write("zeros.encrypted", b"")
    site.write("blob.encrypted", site.blob(site.secret("blob", 10)))
    names = ["message", "zeros", "blob"]
    try:
        for name in names:
            os.truncate(site.source / f"{name}.encrypted", 1 << 40)
        yield names
    finally:
        for name in names:
            os.truncate(site.source / f"{name}.encrypted", 0)


def test_sparse_terabytes_are_refused_unread(
    strict_site: StrictSite, good: bytes, sparse: list[str], view: str
) -> None:
    volume = strict_site.mount(exit_code=exit_code_of_mount(view))
    assert strerror_of_cat(volume.path / "message") == said_of_refused(view, fuse=BAD_MESSAGE)
    assert strerror_of_cat(volume.path / "zeros") == ABSENT
    assert reasons(volume)["zeros.encrypted"] == "of no known format"
    assert_unharmed(volume, good)
    volume.umount()


def test_any_name_up_to_255_bytes_is_served_or_said(strict_site: StrictSite, good: bytes) -> None:
    site = strict_site
    content = site.secret("name", 40)
    longest = "l" * (255 - len(".encrypted"))
    for name in ("line\nbreak\r\t", "\x1b[31mred", longest, "ü" * 122):
        site.write(f"{name}.encrypted", site.blob(content))
    for raw in (b"bad-\xff.encrypted", b"\xc3\x28.encrypted"):
        site.write(os.fsdecode(raw), site.blob(content))
    volume = site.mount()
    for name in ("line\nbreak\r\t", "\x1b[31mred", longest, "ü" * 122):
        assert (volume.path / name).read_bytes() == content
    for raw in (b"bad-\xff", b"bad-\xff.encrypted", b"\xc3\x28"):
        assert not os.path.lexists(os.fsencode(volume.path) + b"/" + raw)
    shown = volume.kmsfs("status", volume.path).output
    assert "\x1b" not in shown
    assert list(reasons(volume).values()) == ["its name is not UTF-8"] * 2
    assert_unharmed(volume, good)


def test_deep_trees_are_served_to_the_end(strict_site: StrictSite, good: bytes) -> None:
    content = strict_site.secret("deep", 40)
    deep = "/".join(["d" * 30] * _DEPTH)
    strict_site.write(f"{deep}/key.encrypted", strict_site.blob(content))
    volume = strict_site.mount()
    assert (volume.path / deep / "key").read_bytes() == content
    assert_unharmed(volume, good)


def test_a_source_that_is_removed_and_put_back(
    strict_site: StrictSite, good: bytes, view: str
) -> None:
    source = strict_site.source
    volume = strict_site.mount()
    kept = strict_site.directory / "kept"
    shutil.copytree(source, kept)
    shutil.rmtree(source)
    wait_until(lambda: strerror_of_cat(volume.path / "good") != "", "the file is gone", _SEEN_S)
    assert strerror_of_cat(volume.path / "dir/good") == ABSENT
    assert volume.status()["served"] == 0
    shutil.copytree(kept, source)
    # The mount is of the directory that was, not of another by its name.
    assert strerror_of_cat(volume.path / "good") == ABSENT
    volume.umount()
    assert_unharmed(strict_site.mount(), good)


@pytest.fixture
def mounted_source(strict_site: StrictSite, tmp_path: Path) -> Iterator[Path]:
    """A source that is a filesystem of its own, to be taken away."""
    path = strict_site.source
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)


def test_a_source_that_is_unmounted_lazily_is_served_on(
    mounted_source: Path, strict_site: StrictSite, good: bytes
) -> None:
    volume = strict_site.mount()
    subprocess.run(["umount", "-l", mounted_source], check=True)
    assert_unharmed(volume, good)
    assert strerror_of_cat(volume.path / "other") == ABSENT
    volume.umount()


def test_a_source_that_turns_read_only_is_served_on(
    mounted_source: Path, strict_site: StrictSite, good: bytes
) -> None:
    volume = strict_site.mount()
    subprocess.run(["mount", "-o", "remount,ro", mounted_source], check=True)
    assert_unharmed(volume, good)
    subprocess.run(["mount", "-o", "remount,rw", mounted_source], check=True)
    new = strict_site.secret("new", 50)
    strict_site.write("dir/new.encrypted", strict_site.blob(new))
    wait_until((volume.path / "dir/new").exists, "what is written later shows", _SEEN_S)
    assert (volume.path / "dir/new").read_bytes() == new
    volume.umount()


def test_a_name_that_turns_into_something_else_while_mounted(
    strict_site: StrictSite, good: bytes
) -> None:
    site = strict_site
    site.write("turns.encrypted", site.blob(site.secret("turns", 40)))
    volume = site.mount()
    path = site.source / "turns.encrypted"
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/etc/passwd"),
        lambda: path.symlink_to("turns.encrypted"),
    ):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        make()
        wait_until(lambda: strerror_of_cat(volume.path / "turns") == ABSENT, "it is gone", _SEEN_S)
        assert_unharmed(volume, good)
