"""The ramfs view on bad days: killed, refused, without KMS or FUSE, on the wrong filesystem."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kmsfs import libc
from kmsfs.errors import GuaranteeNotMet
from kmsfs.settings import RamSettings
from kmsfs.views import mountpoint as mounts
from kmsfs.views import ram_mount
from tests.support.commands import run_kmsfs
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import (
    MountedVolume,
    process_name,
    processes_of,
    wait_gone,
    wait_until,
)
from tests.support.sites import Site, StrictSite

RAMFS_MAGIC = 0x858458F6


def ramfs(site: Site, *arguments: str, **how: object) -> MountedVolume:
    """A mount in the ramfs view."""
    return site.mount("--view", "ramfs", *arguments, **how)  # type: ignore[arg-type] # **object


def kill_all(volume: MountedVolume) -> None:
    """SIGKILL to every process of a mount, at once."""
    pids = processes_of(volume.path)
    for pid in pids:
        # Some end by themselves when the others do.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)


def hidden_in(path: Path) -> list[str]:
    """Names of the layout that are in a ramfs, the current set's own excepted."""
    return [
        name
        for name in os.listdir(path)
        if name.startswith("..") and name not in ("..data", os.readlink(path / "..data"))
    ]


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", range(4))
def test_killed_at_any_moment_of_a_refresh_it_shows_one_whole_set_and_is_taken_over(
    site: Site, run: int
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    site.make_volume()
    names = [f"file-{number}" for number in range(12)]
    old, new = site.secret("old", 20_000), site.secret("new", 30_000)
    for name in names:
        site.encrypt(name, old)
    volume = ramfs(site)
    for name in names:
        site.encrypt(name, new)
    wait_briefly(chance.uniform(0.0, 0.8))
    kill_all(volume)
    assert volume.mount is not None
    shown = {(volume.path / name).read_bytes() for name in names}
    assert shown in ({old}, {new})

    volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs")
    assert {(volume.path / name).read_bytes() for name in names} == {new}
    wait_until(lambda: hidden_in(volume.path) == [], "what was left is wiped")
    volume.umount()
    assert os.listdir(volume.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("run", range(2))
def test_ended_at_any_moment_of_a_refresh_it_leaves_nothing_and_can_be_mounted_again(
    site: Site, number: signal.Signals, run: int
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    site.make_volume()
    names = [f"file-{number}" for number in range(12)]
    new = site.secret("new", 30_000)
    for name in names:
        site.encrypt(name, site.secret("old", 20_000))
    volume = ramfs(site)
    pids = processes_of(volume.path)
    for name in names:
        site.encrypt(name, new)
    wait_briefly(chance.uniform(0.0, 0.6))
    os.kill(volume.launcher_pid, number)
    for pid in pids:
        wait_gone(pid)
    assert volume.mount is None
    assert os.listdir(volume.path) == []
    volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs")
    assert {(volume.path / name).read_bytes() for name in names} == {new}


def wait_briefly(seconds: float) -> None:
    """Let other processes come to an arbitrary point."""
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], check=True)


def test_taking_over_needs_no_kms_for_what_has_not_changed(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    kept, changed = site.secret("kept", 3000), site.secret("changed", 3000)
    site.encrypt("kept", kept)
    site.encrypt("changes", site.secret("before", 3000))
    volume = ramfs(site)
    kill_all(volume)
    site.encrypt("changes", changed)
    site.kms.forget_calls()
    volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs")
    assert len(site.kms.calls("Decrypt")) == 1
    assert (volume.path / "kept").read_bytes() == kept
    assert (volume.path / "changes").read_bytes() == changed


def test_an_older_version_is_refused_by_who_takes_over_as_well(site: Site) -> None:
    site.make_volume()
    old = site.encrypt("key", site.secret("old", 3000)).read_bytes()
    ciphertext = site.encrypt("key", site.secret("new", 3000))
    volume = ramfs(site)
    kill_all(volume)
    ciphertext.write_bytes(old)
    volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs", exit_code=1)
    assert volume.failing() == {"key": "RolledBack"}
    assert volume.names() == []


def test_other_settings_take_nothing_over(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 3000))
    volume = ramfs(site)
    kill_all(volume)
    site.append_config('[[rule]]\nmatch = "key"\nmode = "0444"\n')
    site.kms.forget_calls()
    volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs")
    assert len(site.kms.calls("Decrypt")) == 1
    assert (volume.path / "key").stat().st_mode & 0o777 == 0o444


def test_a_killed_daemon_is_replaced_and_no_reader_misses_a_file(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    content = site.secret("key", 3000)
    site.encrypt("key", content)
    volume = ramfs(site)
    device = volume.mount.device if volume.mount else ""
    site.kms.forget_calls()
    old_pid = volume.status()["daemon_pid"]
    os.kill(old_pid, signal.SIGKILL)
    # So that the next one has something to decrypt before it is ready.
    first = site.secret("first", 100)
    site.encrypt("first", first)

    def is_replaced() -> bool:
        assert (volume.path / "key").read_bytes() == content
        pids = [pid for pid in processes_of(volume.path) if process_name(pid) == "kmsfs-daemon"]
        return pids != [] and old_pid not in pids

    wait_until(is_replaced, "another daemon is there")
    wait_until((volume.path / "first").exists, "it is in step")
    assert (volume.path / "first").read_bytes() == first
    later = site.secret("later", 100)
    site.encrypt("later", later)
    wait_until((volume.path / "later").exists, "it follows the source again")
    assert (volume.path / "later").read_bytes() == later
    assert volume.mount is not None
    assert volume.mount.device == device
    assert len(site.kms.calls("Decrypt")) == 2


def test_mounting_over_a_live_one_is_refused(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    volume = ramfs(site)
    for view in ("ramfs", "fuse", "auto"):
        arguments = ["mount", site.source, volume.path, "--view", view]
        done = run_kmsfs(arguments, env=site.env, exit_code=7)
        assert f"kmsfs: hint: kmsfs umount {volume.path}" in done.stderr
    assert len((volume.path / "key").read_bytes()) == 300


def test_fuse_takes_the_place_of_what_a_killed_process_left(site: Site) -> None:
    site.make_volume()
    content = site.secret("key", 3000)
    site.encrypt("key", content)
    volume = ramfs(site)
    kill_all(volume)
    volume.kmsfs("mount", site.source, volume.path)
    assert volume.status()["view"] == "fuse"
    assert (volume.path / "key").read_bytes() == content
    below = [m for m in mounts.mount_table() if m.mountpoint == str(volume.path)]
    assert [m.fs_type for m in below] == ["fuse.kmsfs"]


# --- KMS -----------------------------------------------------------------------------------------


def test_without_a_ttl_kms_is_never_asked_again(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    volume = ramfs(site)
    site.client.disable_key(KeyId=site.key_arn)
    # A refresh for another reason does not ask either.
    site.write("readme.txt", b"not ciphertext")
    wait_until(lambda: volume.status()["ignored_count"] == 1, "it is noticed")
    assert len((volume.path / "key").read_bytes()) == 300


def test_a_refusal_after_the_ttl_takes_the_file_away_and_it_comes_back(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, other.arn))
    site.append_config("[cache]\nttl_s = 0.5\nstale_s = 600\n")
    kept = site.secret("kept", 300)
    site.encrypt("kept", kept)
    site.encrypt("refused", site.secret("refused", 300), key_arn=other.arn)
    volume = ramfs(site)
    site.client.disable_key(KeyId=other.arn)
    wait_until(lambda: not (volume.path / "refused").exists(), "it is taken away")
    assert (volume.path / "kept").read_bytes() == kept
    failing = {item["path"]: item["reason"] for item in volume.status()["failing"]}
    assert failing["refused"].startswith("KeyUnusable")
    site.client.enable_key(KeyId=other.arn)
    wait_until((volume.path / "refused").exists, "it is back")
    assert volume.status()["failing"] == []


def test_without_kms_an_expired_file_stays_for_the_stale_time_and_says_so(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 4.0\n[cache]\nttl_s = 0.3\nstale_s = 600\n")
    content = site.secret("key", 300)
    site.encrypt("key", content)
    volume = ramfs(site, env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url})
    fault_proxy.inject(Fault.RESET)
    wait_until(lambda: volume.status()["ram"]["stale"] != [], "it is stale", 20.0)
    assert (volume.path / "key").read_bytes() == content
    assert "stale    1 file, kept until KMS can be asked" in (
        volume.kmsfs("status", volume.path).output
    )
    fault_proxy.heal()
    wait_until(lambda: volume.status()["ram"]["stale"] == [], "KMS is back", 20.0)
    assert (volume.path / "key").read_bytes() == content


def test_without_kms_an_expired_file_goes_where_no_stale_time_is_set(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 4.0\n[cache]\nttl_s = 0.3\n")
    content = site.secret("key", 300)
    site.encrypt("key", content)
    volume = ramfs(site, env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url})
    fault_proxy.inject(Fault.RESET)
    wait_until(lambda: not (volume.path / "key").exists(), "it is taken away", 20.0)
    fault_proxy.heal()
    wait_until((volume.path / "key").exists, "KMS is back", 20.0)
    assert (volume.path / "key").read_bytes() == content


def test_while_kms_is_away_for_one_of_a_changed_pair_both_stay_as_they_were(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, other.arn))
    site.append_config("deadline_s = 4.0\n")
    old, new = site.secret("old", 300), site.secret("new", 300)
    site.encrypt("cert", old)
    site.encrypt("key", old, key_arn=other.arn)
    volume = ramfs(site)
    site.kms.fail("KMSInternalException", operation="Decrypt", key=other)
    site.encrypt("cert", new)
    site.encrypt("key", new, key_arn=other.arn)
    wait_until(lambda: volume.status()["ram"]["stale"] != [], "KMS was asked", 20.0)
    assert {(volume.path / name).read_bytes() for name in ("cert", "key")} == {old}
    stale = {item["path"] for item in volume.status()["ram"]["stale"]}
    assert stale == {"cert", "key"}
    site.kms.heal()
    wait_until(lambda: (volume.path / "key").read_bytes() == new, "KMS is back", 20.0)
    assert (volume.path / "cert").read_bytes() == new


def test_credentials_that_come_later_are_found_without_a_remount(
    strict_site: StrictSite, tmp_path: Path
) -> None:
    site = strict_site
    site.make_volume()
    content = site.secret("key", 300)
    site.encrypt("key", content)
    credentials = tmp_path / "credentials"
    without = {k: v for k, v in site.env.items() if "ACCESS_KEY" not in k}
    volume = MountedVolume(
        site.source, site.directory / "mnt",
        {**without, "AWS_SHARED_CREDENTIALS_FILE": str(credentials)},
    )  # fmt: skip
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    done = volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs", exit_code=1)
    assert "kmsfs: error: key: " in done.stderr
    assert not (volume.path / "key").exists()
    admin = site.kms.admin
    credentials.write_text(
        f"[default]\naws_access_key_id = {admin.access_key_id}\n"
        f"aws_secret_access_key = {admin.secret_access_key}\n"
    )
    wait_until((volume.path / "key").exists, "it is there", 20.0)
    assert (volume.path / "key").read_bytes() == content


# --- the filesystem ------------------------------------------------------------------------------


@pytest.fixture
def prepared(site: Site) -> Path:
    """A ramfs that an administrator has mounted where kmsfs is to serve."""
    path = site.directory / "mnt"
    path.mkdir()
    libc.mount("prepared", str(path), "ramfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC, "")
    return path


def unmount(path: Path) -> None:
    """Take a test's own mount away."""
    mounts.unmount(str(path))


def test_a_prepared_ramfs_is_filled_in_place_and_stays_mounted(site: Site, prepared: Path) -> None:
    site.make_volume()
    content = site.secret("key", 300)
    site.encrypt("key", content)
    mount_id = mounts.find_mount(str(prepared))
    volume = ramfs(site)
    assert mounts.find_mount(str(prepared)) == mount_id
    assert (volume.path / "key").read_bytes() == content
    shown = json.loads(volume.kmsfs("status", "--json").output)
    assert str(prepared) in [item["mountpoint"] for item in shown]
    pids = processes_of(volume.path)
    volume.umount()
    for pid in pids:
        wait_gone(pid)
    assert mounts.find_mount(str(prepared)) == mount_id
    assert os.listdir(prepared) == []
    unmount(prepared)


def test_a_prepared_ramfs_with_files_of_others_is_refused(site: Site, prepared: Path) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    (prepared / "theirs").write_text("x")
    arguments = ["mount", site.source, prepared, "--view", "ramfs"]
    done = run_kmsfs(arguments, env=site.env, exit_code=7)
    assert "holds files that are not of kmsfs: theirs" in done.stderr
    assert os.listdir(prepared) == ["theirs"]
    unmount(prepared)


def test_a_prepared_ramfs_with_weaker_options_is_refused_before_a_byte_is_written(
    site: Site,
) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    path = site.directory / "mnt"
    path.mkdir()
    libc.mount("prepared", str(path), "ramfs", libc.MS_NOSUID, "")
    arguments = ["mount", site.source, path, "--view", "ramfs"]
    done = run_kmsfs(arguments, env=site.env, exit_code=6)
    assert f"{path} is not mounted nodev,noexec" in done.stderr
    assert f"hint: mount -o remount,nodev,noexec {path}" in done.stderr
    assert os.listdir(path) == []
    unmount(path)


def test_only_a_ramfs_with_all_its_options_passes_for_one(mountable: None, tmp_path: Path) -> None:
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    for name, kind in (("good", "ramfs"), ("tmpfs", "tmpfs"), ("bound", "")):
        (tmp_path / name).mkdir()
        if kind:
            libc.mount("test", str(tmp_path / name), kind, flags, "")
    subprocess.run(["mount", "--bind", tmp_path, tmp_path / "bound"], check=True)
    try:
        for name, accepted in (("good", True), ("tmpfs", False), ("bound", False), (".", False)):
            fd = os.open(tmp_path / name, os.O_PATH | os.O_DIRECTORY)
            try:
                if accepted:
                    ram_mount.verify(fd, name, RamSettings())
                    continue
                with pytest.raises(GuaranteeNotMet, match="not on a ramfs"):
                    ram_mount.verify(fd, name, RamSettings())
            finally:
                os.close(fd)
    finally:
        for name in ("good", "tmpfs", "bound"):
            unmount(tmp_path / name)


def test_a_filesystem_mounted_over_it_gets_no_byte_and_is_reported(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    volume = ramfs(site)
    assert volume.mount is not None
    device, new = volume.mount.device, site.secret("new", 300)
    libc.mount("over", str(volume.path), "tmpfs", 0, "")
    try:
        site.encrypt("new", new)
        wait_until(lambda: problem_of(device) != "", "it is noticed")
        assert "another filesystem (tmpfs) is mounted" in problem_of(device)
        assert os.listdir(volume.path) == []
    finally:
        unmount(volume.path)
    site.encrypt("newer", new)
    wait_until((volume.path / "newer").exists, "it goes on")
    assert (volume.path / "new").read_bytes() == new


def problem_of(device: str) -> str:
    """Why a ramfs is not kept in step, asked of its daemon by its device."""
    from kmsfs.admin import control

    answer = control.call(device, os.geteuid(), control.StatusRequest())
    assert isinstance(answer, control.StatusAnswer)
    assert answer.status.ram is not None
    return answer.status.ram.problem


def test_a_tmpfs_that_never_swaps_will_do_where_it_is_asked_for(site: Site) -> None:
    site.make_volume()
    content = site.secret("key", 300)
    site.encrypt("key", content)
    volume = ramfs(site, "--ram", "tmpfs")
    assert volume.mount is not None
    assert volume.mount.fs_type == "tmpfs"
    assert "noswap" in volume.mount.super_options
    assert (volume.path / "key").read_bytes() == content
    assert volume.status()["ram"]["swappable"] is False
    assert not any("swap" in text for text in volume.status()["weaknesses"])


def test_a_tmpfs_that_swaps_needs_a_word_and_is_shown_as_weaker(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    path = site.directory / "mnt"
    path.mkdir()
    libc.mount("prepared", str(path), "tmpfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC, "")
    arguments = ["mount", site.source, path, "--view", "ramfs", "--ram", "tmpfs"]
    done = run_kmsfs(arguments, env=site.env, exit_code=6)
    assert "can be swapped out" in done.stderr
    assert "--allow-swap" in done.stderr
    volume = ramfs(site, "--ram", "tmpfs", "--allow-swap")
    assert volume.status()["ram"]["swappable"] is True
    assert any("can be swapped out" in text for text in volume.status()["weaknesses"])
    volume.umount()
    unmount(path)


def test_a_source_without_inotify_is_polled(site: Site, tmp_path: Path) -> None:
    # Ciphertext of ciphertext: the inner mount's source is a FUSE filesystem.
    site.make_volume()
    first, second = site.secret("first", 200), site.secret("second", 200)
    site.encrypt("key.encrypted", site.blob(first))
    outer = site.mount(path=tmp_path / "outer")
    inner = site.mounter.mount(
        outer.path, tmp_path / "inner", "--view", "ramfs", "--key-id", site.key_arn
    )
    assert (inner.path / "key").read_bytes() == first
    site.encrypt("key.encrypted", site.blob(second))
    # Two seconds of either mount.
    wait_until(lambda: (inner.path / "key").read_bytes() == second, "it follows", 5.0)
    inner.umount()


# --- without FUSE --------------------------------------------------------------------------------

WITHOUT_FUSE = """
set -e
mkdir "$1/dev"
mount -t tmpfs tmpfs "$1/dev"
for name in null zero full random urandom tty; do
    touch "$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"
done
ln -s /proc/self/fd "$1/dev/fd"
eval "$2"
mount --rbind "$1/dev" /dev
set +e
shift 2
for command in "$@"; do
    echo "== $command" >&2
    eval "$command"
    echo "== exit $?" >&2
done
umount -l "$MNT" 2>/dev/null
true
"""


def run_without_fuse(site: Site, change: str, *commands: str) -> "subprocess.CompletedProcess[str]":
    """Run commands in a mount namespace whose /dev has no fuse; `$KMSFS`, `$SRC` and `$MNT`."""
    mountpoint = site.directory / "mnt"
    mountpoint.mkdir()
    env = {
        **site.env,
        "KMSFS": f"{sys.executable} -m kmsfs",
        "SRC": str(site.source),
        "MNT": str(mountpoint),
    }
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", WITHOUT_FUSE, "bash"]
        + [str(site.directory), change, *commands],
        env=env, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_auto_takes_a_ramfs_where_there_is_no_fuse_and_says_so(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    done = run_without_fuse(
        site, "",
        "$KMSFS mount $SRC $MNT", "findmnt -no FSTYPE $MNT", "wc -c < $MNT/key",
        "$KMSFS status $MNT", "$KMSFS umount $MNT", "$KMSFS mount $SRC $MNT --view fuse",
    )  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["ramfs", "300"]
    assert "view     ramfs, since FUSE cannot be used: /dev/fuse: No such file" in done.stdout
    said = done.stderr.split("== ")
    assert "kmsfs: warning: FUSE cannot be used (/dev/fuse: No such file" in said[1]
    assert "every file is decrypted now and at each change" in said[1]
    assert [line for line in done.stderr.splitlines() if line.startswith("== exit")] == (
        ["== exit 0"] * 5 + ["== exit 7"]
    )
    assert "kmsfs: error: /dev/fuse: No such file or directory" in said[-2]


def test_auto_does_not_fall_back_for_another_fault_of_fuse(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    done = run_without_fuse(
        site, 'touch "$1/dev/fuse"', "$KMSFS mount $SRC $MNT", "findmnt -no FSTYPE $MNT"
    )
    assert "kmsfs: error: mounting FUSE at " in done.stderr
    assert "== exit 7" in done.stderr
    assert done.stdout == ""


def test_without_the_right_to_mount_a_prepared_ramfs_is_filled(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    powerless = "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin"
    done = run_without_fuse(
        site, "mount -t ramfs -o nosuid,nodev,noexec ramfs $MNT",
        f"{powerless} $KMSFS mount $SRC $MNT", "wc -c < $MNT/key",
        f"{powerless} $KMSFS umount $MNT", "ls -A $MNT", "findmnt -no FSTYPE $MNT",
    )  # fmt: skip
    assert done.stdout.splitlines() == ["300", "ramfs"]
    assert done.stderr.count("== exit 0") == 5
