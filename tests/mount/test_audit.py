"""The audit log: who opened what, written before the program can read, and what if it cannot be."""

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kmsfs.settings import AuditSettings
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_gone, wait_until
from tests.support.sites import Site, StrictSite
from tests.support.system_mounts import mount_with

IO_ERROR = "Input/output error"


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """Where it is recorded; not there yet."""
    return tmp_path / "audit.jsonl"


@pytest.fixture
def content(site: Site) -> bytes:
    """What is in the file `key`."""
    site.make_volume()
    content = site.secret("key", 300)
    site.encrypt("key", content)
    return content


def audited(site: Site, log_file: Path, *, required: bool, **more: Any) -> MountedVolume:
    settings = AuditSettings(file=str(log_file), required=required)
    return mount_with(site, more.pop("view", "fuse"), audit=settings, **more)[0]


def records(log_file: Path, event: str = "") -> list[dict[str, Any]]:
    """The lines of the log, of one kind or of all."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines() if line]
    return [line for line in lines if event in ("", line["event"])]


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True])
def test_each_open_is_recorded_with_who_and_whether_it_was_in_memory(
    site: Site, content: bytes, log_file: Path, *, required: bool
) -> None:
    volume = audited(site, log_file, required=required)
    before = time.time()
    reader = subprocess.Popen(["cat", volume.path / "key"], stdout=subprocess.PIPE)
    assert reader.communicate(timeout=20)[0] == content
    assert (volume.path / "key").read_bytes() == content
    wait_until(lambda: len(records(log_file, "Opened")) == 2, "both are written")
    first, second = records(log_file, "Opened")
    assert (first["path"], first["uid"], first["gid"]) == ("key", 0, 0)
    assert (first["pid"], first["from_cache"]) == (reader.pid, False)
    assert (second["pid"] != reader.pid, second["from_cache"]) == (True, True)
    assert [record["stale"] for record in (first, second)] == [False, False]
    assert 0 <= second["age_s"] <= time.time() - before + 1
    assert [record["path"] for record in records(log_file, "Decrypted")] == ["key"]
    assert stat.S_IMODE(log_file.stat().st_mode) == 0o600


def test_what_is_required_is_in_the_file_before_the_program_has_its_descriptor(
    site: Site, content: bytes, log_file: Path
) -> None:
    volume = audited(site, log_file, required=True)
    for count in range(1, 50):
        with (volume.path / "key").open("rb"):
            assert len(records(log_file, "Opened")) == count


def test_a_refused_open_and_the_lock_are_recorded(strict_site: StrictSite, log_file: Path) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    volume = audited(site, log_file, required=False)
    site.kms.deny(site.kms.admin, "Decrypt", site.key)
    assert strerror_of_cat(volume.path / "key") == "Key was rejected by service"
    volume.kmsfs("lock", volume.path)
    wait_until(lambda: records(log_file, "LockChanged") != [], "it is written")
    (refused,) = records(log_file, "OpenRefused")
    assert (refused["path"], refused["error"]) == ("key", "KeyAccessDenied")
    assert records(log_file, "LockChanged")[0]["by_uid"] == 0


def test_an_open_that_is_served_stale_is_recorded_as_that(
    strict_site: StrictSite, fault_proxy: FaultProxy, log_file: Path
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 2.0\n[cache]\nttl_s = 0.3\nstale_s = 600\n")
    content = site.secret("key", 100)
    site.encrypt("key", content)
    env = {**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url}
    volume = audited(site, log_file, required=True, env=env)
    with (volume.path / "key").open("rb"):
        fault_proxy.inject(Fault.RESET)
        wait_until(lambda: volume.status()["cached"][0]["age_s"] > 0.3, "its time is over")
        assert (volume.path / "key").read_bytes() == content
    fresh, stale = records(log_file, "Opened")
    assert (fresh["stale"], stale["stale"], stale["from_cache"]) == (False, True, True)
    assert stale["age_s"] > 0.3


def test_names_that_could_break_a_line_do_not(site: Site, log_file: Path) -> None:
    site.make_volume()
    name = 'new\nline "quoted"'
    content = site.secret("name", 50)
    site.encrypt(name, content)
    volume = audited(site, log_file, required=True)
    assert (volume.path / name).read_bytes() == content
    assert [record["path"] for record in records(log_file, "Opened")] == [name]


# --- the file ------------------------------------------------------------------------------------


def test_a_log_that_is_renamed_away_is_begun_anew(
    site: Site, content: bytes, log_file: Path
) -> None:
    volume = audited(site, log_file, required=True)
    assert (volume.path / "key").read_bytes() == content
    old = log_file.rename(log_file.with_suffix(".1"))
    assert (volume.path / "key").read_bytes() == content
    assert (len(records(old, "Opened")), len(records(log_file, "Opened"))) == (1, 1)


def test_a_log_that_cannot_be_opened_is_said_and_nothing_is_mounted(
    site: Site, content: bytes, tmp_path: Path
) -> None:
    settings = AuditSettings(file=str(tmp_path / "nowhere/audit.jsonl"))
    volume, said = mount_with(site, "fuse", audit=settings, exit_code=6)
    assert "nowhere/audit.jsonl: No such file or directory" in said
    assert volume.mount is None


def test_a_link_is_not_followed(site: Site, content: bytes, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / "link").symlink_to(target)
    settings = AuditSettings(file=str(tmp_path / "link"))
    _, said = mount_with(site, "fuse", audit=settings, exit_code=6)
    assert "Too many levels of symbolic links" in said
    assert target.read_text() == "theirs"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def whole_records(log_file: Path, event: str) -> list[dict[str, Any]]:
    """As `records`, without a line that the disk had no room for to its end."""
    lines = [line for line in log_file.read_text().splitlines() if line.endswith("}")]
    return [record for record in map(json.loads, lines) if record["event"] == event]


def fill(path: Path) -> None:
    """Leave no byte on a filesystem."""
    free = os.statvfs(path)
    (path / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    with (path / "filler").open("ab", buffering=0) as file, pytest.raises(OSError, match="space"):
        file.write(b"1")


def test_a_full_disk_refuses_opens_that_must_be_recorded_until_there_is_room(
    site: Site, content: bytes, small_disk: Path
) -> None:
    log_file = small_disk / "audit.jsonl"
    volume = audited(site, log_file, required=True)
    with (volume.path / "key").open("rb", buffering=0) as held:
        fill(small_disk)
        wait_until(lambda: strerror_of_cat(volume.path / "key") == IO_ERROR, "it is refused")
        assert held.read() == content
        status = volume.kmsfs("status", volume.path).output
        assert f"  audit    {log_file}, required\n" in status
        assert "cannot be written: No space left on device" in status
        before = len(whole_records(log_file, "Opened"))
        (small_disk / "filler").unlink()
        assert (volume.path / "key").read_bytes() == content
    assert len(whole_records(log_file, "Opened")) == before + 1
    (lost,) = whole_records(log_file, "RecordsLost")
    assert lost["count"] > 0
    assert "cannot be written" not in volume.kmsfs("status", volume.path).output


def test_a_full_disk_is_shown_and_costs_no_open_where_the_log_is_not_required(
    site: Site, content: bytes, small_disk: Path
) -> None:
    volume = audited(site, small_disk / "audit.jsonl", required=False)
    fill(small_disk)
    for _ in range(20):
        assert (volume.path / "key").read_bytes() == content
    wait_until(lambda: volume.status()["audit"]["problem"] != "", "it is noticed")


# --- processes -----------------------------------------------------------------------------------


def test_a_launcher_that_does_not_write_fails_required_opens_by_their_deadline(
    site: Site, content: bytes, log_file: Path
) -> None:
    site.append_config("deadline_s = 1.5\n")
    volume = audited(site, log_file, required=True)
    assert (volume.path / "key").read_bytes() == content
    launcher = volume.launcher_pid
    os.kill(launcher, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert strerror_of_cat(volume.path / "key") == IO_ERROR
        assert time.monotonic() - started < 8.0
        assert (volume.path / "key").stat().st_size == 300
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert (volume.path / "key").read_bytes() == content


def test_what_a_killed_daemon_had_recorded_is_written_and_the_next_one_goes_on(
    site: Site, content: bytes, log_file: Path
) -> None:
    volume = audited(site, log_file, required=False)
    launcher, daemon = volume.launcher_pid, volume.status()["daemon_pid"]
    os.kill(launcher, signal.SIGSTOP)
    try:
        # More than are written at once.
        for _ in range(150):
            assert (volume.path / "key").read_bytes() == content
        os.kill(daemon, signal.SIGKILL)
        wait_gone(daemon)
    finally:
        os.kill(launcher, signal.SIGCONT)
    wait_until(lambda: strerror_of_cat(volume.path / "key") == "", "it serves again")
    wait_until(lambda: len(records(log_file, "Opened")) == 151, "all are written")


# --- the ramfs view ------------------------------------------------------------------------------


def test_the_ramfs_view_records_what_it_shows_and_that_opens_are_not_seen(
    site: Site, content: bytes, log_file: Path
) -> None:
    volume = audited(site, log_file, required=False, view="ramfs")
    assert (volume.path / "key").read_bytes() == content
    wait_until(lambda: records(log_file, "Published") != [], "it is written")
    assert [record["path"] for record in records(log_file, "Decrypted")] == ["key"]
    assert "who opens a file of a ramfs is not recorded" in volume.status()["weaknesses"]


def test_the_ramfs_view_is_refused_where_every_open_must_be_recorded(
    site: Site, content: bytes, log_file: Path
) -> None:
    settings = AuditSettings(file=str(log_file), required=True)
    volume, said = mount_with(site, "ramfs", audit=settings, exit_code=6)
    assert "cannot be recorded" in said
    assert volume.mount is None
