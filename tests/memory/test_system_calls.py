"""What a mount's processes write, seen by strace over a whole run; and the log at every level."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import canary, without_memfd_secret
from tests.support.commands import KMSFS
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.sites import Site, StrictSite

_WRITES = "write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendfile,splice"
_CREATES = "open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,symlinkat,linkat,memfd_create"

# Where a plaintext may be written to; -y shows what a descriptor is.
_ALLOWED_TARGET = re.compile(r"\(\d+<(/dev/fuse[^>]*|/memfd:[^>]*|/secretmem[^>]*)>")

STRACE = ("strace", "-f", "-y", "-s", "1000000", "-e", f"trace={_WRITES},{_CREATES}")


@contextmanager
def foreground(
    site: Site, *arguments: str, trace: Path | None = None, exit_code: int = 0
) -> Iterator[MountedVolume]:
    """A mount in the foreground, its log in `site.directory`.

    Args:
        trace: where strace is to write. It cannot look into memfd_secret, so that is not there.
    """
    volume = MountedVolume(site.source, site.directory / "mnt", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    tracing = [*STRACE, "-o", str(trace), *without_memfd_secret.PREFIX] if trace else []
    with (site.directory / "mount.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*tracing, *KMSFS, "mount", site.source, volume.path, "--foreground", *arguments],
            env=dict(site.env), stderr=log,
        )  # fmt: skip
        try:
            wait_until(lambda: volume.mount is not None, "it is mounted", 60.0)
            wait_until(lambda: strerror_of_cat(volume.path / "key") == "", "it serves", 60.0)
            yield volume
        finally:
            os.kill(volume.launcher_pid, signal.SIGTERM)
            assert launcher.wait(60) == exit_code


def leaking_lines(trace: Path, allowed_below: Path) -> list[str]:
    """Writes of plaintext to anything but /dev/fuse, locked memory, and the ramfs."""
    leaks = []
    for line in trace.read_text(errors="replace").splitlines():
        if not canary.carries(line):
            continue
        target = re.search(r"\(\d+<([^>]*)>", line)
        if _ALLOWED_TARGET.search(line) or (target and _is_ram(target[1], allowed_below)):
            continue
        leaks.append(canary.redact(line)[:200])
    return leaks


def _is_ram(target: str, mountpoint: Path) -> bool:
    # Through the private mount a path is relative to the ramfs's own root.
    return target.startswith(("/..20", f"{mountpoint}/..20"))


def created_files(trace: Path) -> list[str]:
    """Paths that were created, but for those of the ramfs and the interpreter's own cache."""
    created = []
    for line in trace.read_text(errors="replace").splitlines():
        if "O_CREAT" in line or "O_TMPFILE" in line:
            path = re.search(r'"([^"]*)"', line)
            assert path is not None, line
            # An empty file in the control sockets' directory keeps two mounts apart.
            is_lock = path[1].endswith(".lock")
            if "/..20" not in line and "__pycache__" not in line and not is_lock:
                created.append(path[1])
    return created


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_plaintext_is_written_to_its_readers_and_to_nothing_else(site: Site, view: str) -> None:
    site.make_volume()
    contents = {name: site.secret(name, 6000) for name in ("key", "db/password")}
    for name, content in contents.items():
        site.encrypt(name, content)
    trace = site.directory / "trace"
    with foreground(site, "--view", view, trace=trace) as volume:
        for name, content in contents.items():
            assert (volume.path / name).read_bytes() == content
        new = site.secret("rotated", 7000)
        site.encrypt("key", new)
        wait_until(lambda: (volume.path / "key").read_bytes() == new, "the rotation", 20.0)
        volume.kmsfs("lock", volume.path)
        volume.kmsfs("unlock", volume.path)
        wait_until(lambda: strerror_of_cat(volume.path / "key") == "", "it serves again", 20.0)
    assert leaking_lines(trace, volume.path) == []
    assert created_files(trace) == []
    # The trace does see plaintext where it belongs.
    assert canary.carries(trace.read_text(errors="replace"))


@pytest.mark.plaintext_on("files")
def test_the_trace_shows_plaintext_that_a_program_writes(tmp_path: Path) -> None:
    """The control."""
    source = tmp_path / "source"
    source.write_bytes(canary.secret("control", 3000))
    trace = tmp_path / "trace"
    copy = "import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read())"
    subprocess.run(
        [*STRACE, "-o", trace, sys.executable, "-c", copy, source, tmp_path / "copy"], check=True
    )
    assert leaking_lines(trace, tmp_path / "mnt") != []
    assert str(tmp_path / "copy") in created_files(trace)


@pytest.mark.plaintext_on("files")
@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_the_log_holds_no_content_at_any_level(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    site.make_volume("other*", "blob")
    content = site.secret("key", 3000)
    site.encrypt("key", content)
    # Failures of every kind: moved, cut, mutated, refused, of no format, and a plaintext.
    site.write("moved.encrypted", site.encrypt("from", content).read_bytes())
    whole = site.encrypt("cut", content).read_bytes()
    site.write("cut.encrypted", whole[:-20])
    site.write("mutated.encrypted", whole[:-300] + bytes(10) + whole[-290:])
    other = site.kms.create_key()
    site.write("other.encrypted", site.blob(site.secret("other", 100), key_arn=other.arn))
    site.write("plain.encrypted", content)
    # The ramfs lacks files: its status says so.
    with foreground(site, "--view", view, "--debug", exit_code=int(view == "ramfs")) as volume:
        assert (volume.path / "key").read_bytes() == content
        for name in ("moved", "cut", "mutated", "other", "plain"):
            assert strerror_of_cat(volume.path / name) != ""
        site.kms.fail("ThrottlingException", operation="Decrypt", times=5)
        site.encrypt("later", content)
        strerror_of_cat(volume.path / "later")
        volume.kmsfs("lock", volume.path)
    log = (site.directory / "mount.log").read_bytes()
    assert b"DEBUG" in log
    assert b"WARNING" in log
    assert not canary.carries(log)


def test_after_twenty_thousand_reads_with_expiry_everything_is_back_where_it_began(
    site: Site,
) -> None:
    site.make_volume()
    site.append_config("[cache]\nttl_s = 0.5\nidle_s = 0.2\n")
    contents = [site.secret(f"{number}", 2000) for number in range(20)]
    for number, content in enumerate(contents):
        site.encrypt(f"file-{number}", content)
    volume = site.mount()
    pid = volume.status()["daemon_pid"]
    for number, content in enumerate(contents):
        assert (volume.path / f"file-{number}").read_bytes() == content
    # Locked, it has neither zygote nor workers, whose descriptors come and go.
    volume.kmsfs("lock", volume.path)
    before = resources_of(pid)
    volume.kmsfs("unlock", volume.path)
    for count in range(20_000):
        number = count % len(contents)
        fd = os.open(volume.path / f"file-{number}", os.O_RDONLY)
        try:
            assert os.pread(fd, 100, 50) == contents[number][50:150]
        finally:
            os.close(fd)
    volume.kmsfs("lock", volume.path)
    wait_until(lambda: resources_of(pid)[:2] == before[:2], "descriptors and locked memory")
    # Threads and the allocator may take some; one mapping a read would be thousands.
    assert resources_of(pid)[2] <= before[2] + 50


def resources_of(pid: int) -> tuple[int, int, int]:
    """Descriptors, KiB of locked memory, and mappings of a process."""
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    status = Path(f"/proc/{pid}/status").read_text()
    locked = re.search(r"VmLck:\s+(\d+)", status)
    assert locked is not None
    mappings = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
    return descriptors, int(locked[1]), mappings
