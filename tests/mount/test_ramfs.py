"""What only the ramfs view does: whole sets at once, everything at mount, nobody needed to read."""

import json
import mmap
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import watchfiles

from kmsfs.views import mountpoint as mounts
from tests.support.commands import KMSFS, run_kmsfs
from tests.support.mounts import (
    SEEN_S,
    MountedVolume,
    processes_of,
    wait_gone,
    wait_until,
)
from tests.support.sites import Site, StrictSite

HOLDER = """
import sys
with open(sys.argv[1], "rb") as held:
    print("open", flush=True)
    sys.stdin.readline()
    sys.stdout.write("same" if held.read() == bytes.fromhex(sys.argv[2]) else "differs")
"""


def ramfs(site: Site, *arguments: str, **how: object) -> MountedVolume:
    """A mount in the ramfs view."""
    return site.mount("--view", "ramfs", *arguments, **how)  # type: ignore[arg-type] # **object


def names_in(path: Path) -> list[str]:
    """Everything at the top, hidden names included."""
    return sorted(os.listdir(path))


def generations_in(path: Path) -> list[str]:
    """The sets of files that lie in a ramfs."""
    return [name for name in os.listdir(path) if name.startswith("..20")]


def test_it_is_a_ramfs_in_the_layout_of_the_atomic_writer(site: Site) -> None:
    site.make_volume()
    content = site.secret("key", 5000)
    site.encrypt("db/password", content)
    site.encrypt("top", content)
    volume = ramfs(site)
    assert volume.mount is not None
    assert (volume.mount.fs_type, volume.mount.source) == ("ramfs", f"kmsfs:{site.source}")
    (generation,) = generations_in(volume.path)
    assert names_in(volume.path) == sorted(["..data", generation, "db", "top"])
    assert os.readlink(volume.path / "..data") == generation
    assert os.readlink(volume.path / "top") == "..data/top"
    assert os.readlink(volume.path / "db") == "..data/db"
    assert (volume.path / "db/password").read_bytes() == content


def test_nobody_can_enter_before_it_is_filled(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    site.key.latency_s = 1.0
    path = site.directory / "mnt"
    path.mkdir()
    launcher = subprocess.Popen([*KMSFS, "mount", site.source, path, "--view", "ramfs"],
                                env=dict(site.env))  # fmt: skip
    volume = MountedVolume(site.source, path, site.env)
    site.mounter.mounted.append(volume)
    wait_until(lambda: volume.mount is not None, "it is mounted")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert "key" not in names_in(path)
    assert launcher.wait(20) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o555
    assert "key" in names_in(path)


def test_no_process_of_kmsfs_holds_plaintext_once_it_is_filled(site: Site) -> None:
    site.make_volume()
    for number in range(20):
        site.encrypt(f"file-{number}", site.secret(f"{number}", 3000))
    volume = ramfs(site)
    status = volume.status()
    assert (status["cached"], status["cached_bytes"]) == ([], 0)
    assert (status["ram"]["files"], status["ram"]["size_bytes"]) == (20, 20 * 4096)
    assert (status["view"], status["served"]) == ("ramfs", 20)


def test_unchanged_files_are_not_decrypted_again(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    for number in range(5):
        site.encrypt(f"file-{number}", site.secret(f"{number}", 100))
    volume = ramfs(site)
    assert len(site.kms.calls("Decrypt")) == 5
    inode = (volume.path / "file-0").stat().st_ino
    site.kms.forget_calls()
    new = site.secret("new", 200)
    site.encrypt("file-3", new)
    wait_until(lambda: (volume.path / "file-3").read_bytes() == new, "the new content", SEEN_S)
    assert len(site.kms.calls("Decrypt")) == 1
    assert (volume.path / "file-0").stat().st_ino == inode


def pair_of(directory_fd: int) -> tuple[bytes, bytes]:
    """Certificate and key of one set."""
    found = []
    for name in ("tls/cert", "tls/key"):
        with open(os.open(name, os.O_RDONLY, dir_fd=directory_fd), "rb") as file:
            found.append(file.read())
    return found[0], found[1]


class PairReader(threading.Thread):
    """Reads certificate and key of one set, over and over."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.loops = 0
        self.mismatches = 0
        self.seen: set[bytes] = set()
        self.failure: Exception | None = None
        self.enough = threading.Event()

    def run(self) -> None:
        """Until `enough` is set and a thousand loops are done."""
        try:
            while not self.enough.is_set() or self.loops < 1000:
                self.read_once()
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.failure = error

    def read_once(self) -> None:
        """One set, whichever is current now."""
        fd = os.open(self.path / "..data", os.O_RDONLY | os.O_DIRECTORY)
        try:
            cert, key = pair_of(fd)
        finally:
            os.close(fd)
        self.loops += 1
        self.mismatches += cert != key
        self.seen.add(cert[:40])


def test_a_pair_that_rotates_is_never_seen_apart_in_a_thousand_reads(site: Site) -> None:
    site.make_volume()

    def rotate(generation: int) -> bytes:
        label = f"generation {generation:06}"
        content = site.secret(label, 2000)
        for name in ("tls/cert", "tls/key"):
            site.encrypt(name, content)
        return content

    rotate(0)
    volume = ramfs(site)
    reader = PairReader(volume.path)
    reader.start()
    try:
        for generation in range(1, 6):
            content = rotate(generation)
            wait_until(
                lambda content=content: (volume.path / "tls/key").read_bytes() == content,
                "the rotation shows",
                5.0,
            )
    finally:
        reader.enough.set()
        reader.join(60)
    assert reader.failure is None
    assert reader.mismatches == 0
    assert reader.loops >= 1000
    assert len(reader.seen) >= 4


def test_a_pair_whose_second_half_comes_while_the_first_is_decrypted_shows_together(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume()
    names = ("tls/cert", "tls/key")
    sets = []
    for label in ("generation 1", "generation 2"):
        content = site.secret(f"{label:60}", 2000)
        sets.append((content, {name: site.encrypt(name, content).read_bytes() for name in names}))
    (_, before), (content, after) = sets
    for name in names:
        site.write(name + ".encrypted", before[name])
    volume = ramfs(site)
    site.key.latency_s = 1.0
    reader = PairReader(volume.path)
    reader.start()
    try:
        site.write("tls/cert.encrypted", after["tls/cert"])
        wait_until(lambda: site.kms.waiting > 0, "it is decrypted")
        site.write("tls/key.encrypted", after["tls/key"])
        wait_until(lambda: (volume.path / "tls/key").read_bytes() == content, "both show")
    finally:
        reader.enough.set()
        reader.join(60)
    assert reader.failure is None
    assert reader.mismatches == 0


def test_a_change_reaches_programs_that_watch_by_inotify(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("old", 100))
    volume = ramfs(site)
    seen: set[str] = set()
    stop, watching = threading.Event(), threading.Event()

    def watch() -> None:
        changes = watchfiles.watch(
            volume.path, watch_filter=None, stop_event=stop, recursive=False, step=20,
            debounce=50, rust_timeout=50, yield_on_timeout=True,
        )  # fmt: skip
        for batch in changes:
            watching.set()
            seen.update(Path(name).name for _, name in batch)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert watching.wait(10)
        site.encrypt("key", site.secret("new", 100))
        wait_until(lambda: "..data" in seen, "the watcher sees the swap", 5.0)
    finally:
        stop.set()
        watcher.join(10)


def test_a_file_that_fails_is_named_and_does_not_stop_the_others(site: Site) -> None:
    site.make_volume()
    content = site.secret("good", 100)
    site.encrypt("good", content)
    site.write("bad.encrypted", site.encrypt("other", b"x").read_bytes())
    volume = MountedVolume(site.source, site.directory / "mnt", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    done = volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs", exit_code=1)
    assert "kmsfs: error: bad: " in done.stderr
    assert "kmsfs: hint: " in done.stderr
    assert "good" not in done.stderr
    assert (volume.path / "good").read_bytes() == content
    assert not (volume.path / "bad").exists()
    failing = {item["path"]: item["reason"] for item in volume.status()["failing"]}
    assert list(failing) == ["bad"]
    assert failing["bad"].startswith("ContextMismatch: ")


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_require_all_refuses_to_mount_and_leaves_nothing_behind(site: Site, view: str) -> None:
    site.make_volume()
    site.encrypt("good", site.secret("good", 100))
    site.write("bad.encrypted", site.encrypt("other", b"x").read_bytes())
    path = site.directory / "mnt"
    path.mkdir()
    arguments = ["mount", site.source, path, "--view", view, "--require-all"]
    done = run_kmsfs(arguments, env=site.env, exit_code=6)
    assert "kmsfs: error: bad: " in done.stderr
    assert "kmsfs: error: 1 file could not be decrypted, and all are required" in done.stderr
    assert mounts.find_mount(str(path)) is None
    assert os.listdir(path) == []
    assert processes_of(path) == []
    (site.source / "bad.encrypted").unlink()
    volume = site.mount("--view", view, "--require-all")
    assert len((volume.path / "good").read_bytes()) == 100


def test_the_whole_set_is_limited_and_what_does_not_fit_is_not_asked_for(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume("bare")
    site.append_config('[cache]\nmax_bytes = "64KiB"\nmax_file_bytes = "60KiB"\n')
    site.encrypt("a", site.secret("a", 40_000))
    site.encrypt("b", site.secret("b", 40_000))
    site.encrypt("c", site.secret("c", 20_000))
    # Known only once it is decrypted, and then one page too many.
    site.write("bare.encrypted", site.blob(site.secret("bare", 4000)))
    volume = MountedVolume(site.source, site.directory / "mnt", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    site.kms.forget_calls()
    done = volume.kmsfs("mount", site.source, volume.path, "--view", "ramfs", exit_code=1)
    assert "error: b: its 40000 bytes do not fit" in done.stderr
    assert "raise max_bytes under [cache]" in done.stderr
    assert len(site.kms.calls("Decrypt")) == 3
    shown = {name for name in names_in(volume.path) if not name.startswith("..")}
    assert {"a", "c"} - shown == set() or "bare" in shown
    assert volume.status()["ram"]["size_bytes"] <= 65536
    reasons = {item["reason"].partition(":")[0] for item in volume.status()["failing"]}
    assert reasons == {"RamLimitReached"}


def test_lock_names_who_still_reads_and_wipes_it_once_nobody_does(site: Site) -> None:
    site.make_volume()
    content = site.secret("held", 5000)
    site.encrypt("db/held", content)
    site.encrypt("other", site.secret("other", 100))
    volume = ramfs(site)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, volume.path / "db/held", content.hex()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open\n"
        done = volume.kmsfs("lock", volume.path, exit_code=1)
        assert done.output == "locked: 1 plaintext wiped\n"
        assert f"(pid {holder.pid}) can still read it" in done.stderr
        assert names_in(volume.path) == ["..old"]
        assert [item["path"] for item in volume.status()["ram"]["held"]] == ["db/held"]
    finally:
        output, _ = holder.communicate("\n")
    assert output == "same"
    wait_until(lambda: names_in(volume.path) == [], "it is wiped")
    assert volume.status()["ram"]["held"] == []
    volume.kmsfs("unlock", volume.path)
    assert (volume.path / "db/held").read_bytes() == content


def test_unlock_names_what_it_cannot_fill_in_again(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 100))
    volume = ramfs(site)
    volume.kmsfs("lock", volume.path)
    site.kms.deny(site.kms.admin, "Decrypt", site.key)
    done = volume.kmsfs("unlock", volume.path, exit_code=1)
    assert "kmsfs: error: key: KeyAccessDenied: " in done.stderr
    assert not (volume.path / "key").exists()


def test_a_mapped_file_keeps_its_content_after_a_rotation_and_is_wiped_after_it(
    site: Site,
) -> None:
    site.make_volume()
    old, new = site.secret("old", 50_000), site.secret("new", 50_000)
    site.encrypt("key", old)
    volume = ramfs(site)
    fd = os.open(volume.path / "key", os.O_RDONLY)
    view = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    os.close(fd)
    try:
        site.encrypt("key", new)
        wait_until(lambda: (volume.path / "key").read_bytes() == new, "the new content", SEEN_S)
        wait_until(lambda: volume.status()["ram"]["held"] != [], "the old one is put away", 5.0)
        assert view[:] == old
    finally:
        view.close()
    wait_until(lambda: volume.status()["ram"]["held"] == [], "the old one is wiped", 10.0)
    assert len(generations_in(volume.path)) == 1
    assert "..old" not in names_in(volume.path)


def test_once_fills_and_leaves_no_process(site: Site) -> None:
    site.make_volume()
    content = site.secret("key", 3000)
    site.encrypt("key", content)
    volume = site.mount("--once")
    assert processes_of(volume.path) == []
    assert (volume.path / "key").read_bytes() == content
    shown = json.loads(volume.kmsfs("status", volume.path, "--json").output)
    assert (shown["attended"], shown["source"]) == (False, str(site.source))
    assert "no process keeps it in step" in volume.kmsfs("status", volume.path).output
    volume.umount()
    assert volume.mount is None
    assert os.listdir(volume.path) == []


def test_what_was_left_is_checked_with_its_source(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    volume = site.mount("--once")
    done = volume.kmsfs("check", volume.path, "--decrypt", "--content", "--json")
    found = json.loads(done.output)
    assert (found["good"], found["source"], found["volume"]) == (True, str(site.source), "web")
    assert found["content"] == []


def test_once_over_what_was_left_wipes_the_older_set(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("old", 3000))
    volume = site.mount("--once")
    (before,) = generations_in(volume.path)
    new = site.secret("new", 3000)
    site.encrypt("key", new)
    volume.kmsfs("mount", site.source, volume.path, "--once")
    assert (volume.path / "key").read_bytes() == new
    (after,) = generations_in(volume.path)
    assert after != before
    assert "..old" not in names_in(volume.path)


def test_once_says_which_files_are_missing(site: Site) -> None:
    site.make_volume()
    site.write("bad.encrypted", site.encrypt("good", site.secret("good", 10)).read_bytes())
    path = site.directory / "mnt"
    path.mkdir()
    volume = MountedVolume(site.source, path, site.env)
    site.mounter.mounted.append(volume)
    done = volume.kmsfs("mount", site.source, path, "-o", "once", exit_code=1)
    assert "kmsfs: error: bad: " in done.stderr
    assert processes_of(path) == []
    assert (path / "good").exists()


def test_unmounting_what_was_left_names_who_uses_it(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 300))
    volume = site.mount("--once")
    with (volume.path / "key").open("rb") as held:
        done = volume.kmsfs("umount", volume.path, exit_code=7)
        assert " is busy" in done.stderr
        assert len(held.read()) == 300
    volume.umount()


@pytest.mark.parametrize("options", [["--once"], ["--ram", "tmpfs"], ["--allow-swap"]])
def test_options_of_the_ramfs_view_contradict_the_other(site: Site, options: list[str]) -> None:
    site.make_volume()
    path = site.directory / "mnt"
    path.mkdir()
    arguments = ["mount", site.source, path, "--view", "fuse", *options]
    done = run_kmsfs(arguments, env=site.env, exit_code=2)
    assert "kmsfs: hint: --view ramfs" in done.stderr


def test_interrupted_in_the_foreground_it_wipes_and_unmounts(site: Site) -> None:
    site.make_volume()
    content = site.secret("key", 3000)
    site.encrypt("key", content)
    path = site.directory / "mnt"
    path.mkdir()
    launcher = subprocess.Popen(
        [*KMSFS, "mount", site.source, path, "--view", "ramfs", "--foreground"],
        env=dict(site.env), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((path / "key").exists, "it is filled")
    pids = processes_of(path)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 0
    assert "published 1 files, 4096 bytes: 1 added" in errors
    for pid in pids:
        wait_gone(pid)
    assert os.listdir(path) == []


def test_terminated_while_it_is_filled_it_leaves_nothing_mounted(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    for number in range(40):
        site.encrypt(f"file-{number}", site.secret(f"{number}", 100))
    site.key.latency_s = 2.0
    path = site.directory / "mnt"
    path.mkdir()
    mounting = subprocess.Popen(
        [*KMSFS, "mount", site.source, path, "--view", "ramfs"], env=dict(site.env)
    )
    site.kms.wait_for_calls(1, "Decrypt")
    pids = processes_of(path)
    mounting.terminate()
    # Long before the last file.
    assert mounting.wait(8) == 128 + signal.SIGTERM
    for pid in pids:
        wait_gone(pid)
    assert mounts.find_mount(str(path)) is None
    assert os.listdir(path) == []


def test_a_bar_shows_on_a_terminal_while_it_is_filled(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    for number in range(12):
        site.encrypt(f"file-{number}", site.secret(f"{number}", 100))
    site.key.latency_s = 0.3
    volume = MountedVolume(site.source, site.directory / "mnt", site.env)
    volume.path.mkdir()
    site.mounter.mounted.append(volume)
    ours, theirs = pty.openpty()
    mounting = subprocess.Popen(
        [*KMSFS, "mount", site.source, volume.path, "--view", "ramfs"],
        env={**site.env, "TERM": "xterm", "COLUMNS": "100"}, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = read_terminal(ours)
    assert mounting.wait(20) == 0
    assert b"decrypting" in shown
    assert b"%" in shown


def read_terminal(fd: int) -> bytes:
    """What is written to a terminal until its last writer has closed it."""
    shown = b""
    try:
        while select.select([fd], [], [], 30)[0]:
            shown += os.read(fd, 4096)
    except OSError:
        pass  # EIO: closed
    finally:
        os.close(fd)
    return shown
