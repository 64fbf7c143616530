"""`--user`: the daemon has no privilege but to lock memory, and serves all the same."""

import os
import pwd
from pathlib import Path

import pytest

from tests.support.commands import run_kmsfs
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import (
    MountedVolume,
    process_name,
    processes_of,
    strerror_of_cat,
    wait_gone,
    wait_until,
)
from tests.support.sites import Site, StrictSite

USER = "nobody"


def facts_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


@pytest.fixture
def volume(site: Site) -> MountedVolume:
    """A mount whose source only root may read."""
    site.make_volume()
    site.encrypt("top", site.secret("top", 300))
    site.encrypt("db/deep", site.secret("deep", 20_000))
    for path in (site.source, site.source / "db"):
        path.chmod(0o700)
    for path in site.source.rglob("*.encrypted"):
        path.chmod(0o600)
    return site.mount("--user", USER)


def test_the_daemon_is_that_user_and_may_lock_memory_and_nothing_else(
    volume: MountedVolume,
) -> None:
    facts = facts_of(volume.status()["daemon_pid"])
    uid = str(pwd.getpwnam(USER).pw_uid)
    assert set(facts["Uid"].split()) == {uid}
    assert set(facts["Gid"].split()) == {str(pwd.getpwnam(USER).pw_gid)}
    assert facts["Groups"] == ""
    only_locking = f"{1 << 14:016x}"
    assert (facts["CapPrm"], facts["CapEff"]) == (only_locking, only_locking)
    assert {facts[name] for name in ("CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
    assert facts["NoNewPrivs"] == "1"
    assert volume.status()["daemon"]["undumpable"] is True


def test_it_serves_what_only_root_may_read(volume: MountedVolume, site: Site) -> None:
    assert sorted(os.listdir(volume.path)) == ["db", "top"]
    assert (volume.path / "top").read_bytes() == site.secret("top", 300)
    assert (volume.path / "db/deep").stat().st_size == 20_000
    assert (volume.path / "db/deep").read_bytes() == site.secret("deep", 20_000)
    assert volume.status()["served"] == 2
    assert volume.status()["plaintext_in"] == ["memfd_secret"]


def test_it_follows_its_source(volume: MountedVolume, site: Site) -> None:
    new = site.secret("new", 400)
    site.encrypt("db/later", new).chmod(0o600)
    wait_until((volume.path / "db/later").exists, "it shows", 2.0)
    assert (volume.path / "db/later").read_bytes() == new
    (site.source / "top.encrypted").unlink()
    wait_until(lambda: not (volume.path / "top").exists(), "it is gone", 2.0)


def test_lock_ends_workers_that_belong_to_another_user(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("a", site.secret("a", 300))
    site.encrypt("b", site.secret("b", 300))
    volume = site.mount(
        "--user", USER, env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url}
    )
    assert len((volume.path / "a").read_bytes()) == 300
    workers = volume.workers()
    assert workers != []
    fault_proxy.inject(Fault.HANG)
    volume.kmsfs("lock", volume.path)
    for pid in workers:
        wait_gone(pid, 1.0)
    fault_proxy.heal()
    volume.kmsfs("unlock", volume.path)
    assert len((volume.path / "b").read_bytes()) == 300


def test_a_killed_daemon_is_replaced_by_another_without_privileges(volume: MountedVolume) -> None:
    old_pid = volume.status()["daemon_pid"]
    os.kill(old_pid, 9)
    wait_gone(old_pid)
    wait_until(lambda: strerror_of_cat(volume.path / "top") == "", "it serves again")
    new_pid = volume.status()["daemon_pid"]
    assert new_pid != old_pid
    assert facts_of(new_pid)["CapEff"] == f"{1 << 14:016x}"


def test_everything_ends_with_it(volume: MountedVolume) -> None:
    pids = processes_of(volume.path)
    assert "kmsfs-daemon" in {process_name(pid) for pid in pids}
    volume.umount()
    for pid in pids:
        wait_gone(pid)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--user", "root"], "is for a user without privileges"),
        (["--user", "no-such-user"], "there is no user"),
        (["--user", USER, "--view", "ramfs"], "the ramfs view sets owners"),
        (["-o", f"user={USER},once"], "the ramfs view sets owners"),
    ],
)
def test_what_makes_no_sense_is_refused(site: Site, arguments: list[str], said: str) -> None:
    site.make_volume()
    path = site.directory / "mnt"
    path.mkdir()
    done = run_kmsfs(["mount", site.source, path, *arguments], env=site.env, exit_code=2)
    assert said in done.stderr
