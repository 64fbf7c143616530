"""On-change hooks of a mount: what runs them, what they see, and how they end."""

import hashlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from kmsfs.settings import OnChange
from tests.support.mounts import MountedVolume, process_name, processes_of, wait_gone, wait_until
from tests.support.sites import Site
from tests.support.system_mounts import mount_with

# The debounce of the watch, the survey after it, and the time in which changes are collected.
_RUN_S = 10.0


@pytest.fixture(params=["fuse", "ramfs"])
def view(request: pytest.FixtureRequest) -> str:
    """Hooks are run in either view."""
    chosen: str = request.param
    return chosen


@dataclass
class Hooked:
    """A mount whose hook writes a line for each run; what it saw is in the line."""

    site: Site
    volume: MountedVolume
    log: Path

    @property
    def lines(self) -> list[str]:
        """One per run, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def until_run(self, count: int) -> str:
        """Wait until the hook has run so often; the last line."""
        wait_until(lambda: len(self.lines) >= count, f"run {count} of the hook", _RUN_S)
        return self.lines[-1]

    def look_twice(self) -> None:
        """Have whatever is under way come to its end: a change later has been told of."""
        before = self.hook()["runs"]
        self.site.encrypt("db/last", self.site.secret("last", 10))
        wait_until(lambda: self.hook("db/*")["runs"] > 0, "a later change is told", _RUN_S)
        assert self.hook()["runs"] == before

    def hook(self, match: str = "web/*") -> dict[str, object]:
        """How status shows a hook."""
        (found,) = [item for item in self.volume.status()["hooks"] if item["match"] == match]
        record: dict[str, object] = found
        return record


def mount(site: Site, view: str, *hooks: OnChange) -> MountedVolume:
    return mount_with(site, view, on_change=hooks)[0]


@pytest.fixture
def hooked(site: Site, view: str, tmp_path: Path) -> Hooked:
    """Files web/a and db/b; the hook for web/* writes how many changed and web/a's digest."""
    site.make_volume()
    site.encrypt("web/a", site.secret("a", 500))
    site.encrypt("db/b", site.secret("b", 500))
    log = tmp_path / "log"
    script = f'd=$(sha256sum <"$KMSFS_MOUNTPOINT/web/a"); echo "$KMSFS_CHANGED ${{d%% *}}" >>{log}'
    volume = mount(
        site,
        view,
        OnChange(match="web/*", argv=("bash", "-c", script)),
        OnChange(match="db/*", argv=("true",)),
    )
    return Hooked(site, volume, log)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_replaced_file_runs_its_hook_which_reads_the_new_version(hooked: Hooked) -> None:
    (hooked.volume.path / "web/a").read_bytes()
    for run in (1, 2, 3):
        new = hooked.site.secret("new", 500 + run)
        hooked.site.encrypt("web/a", new)
        assert hooked.until_run(run) == f"1 {digest(new)}"
    wait_until(lambda: hooked.hook()["runs"] == 3, "status shows it")
    assert (hooked.hook()["failures"], hooked.hook()["problem"]) == (0, "")


def test_an_old_version_that_is_open_does_not_hide_the_new_one_from_a_hook(
    hooked: Hooked,
) -> None:
    old, new = hooked.site.secret("a", 500), hooked.site.secret("new", 700)
    with (hooked.volume.path / "web/a").open("rb") as opened:
        hooked.site.encrypt("web/a", new)
        assert hooked.until_run(1) == f"1 {digest(new)}"
        assert (hooked.volume.path / "web/a").stat().st_size == 700
        assert opened.read() == old


def test_files_added_and_removed_run_the_hook(hooked: Hooked) -> None:
    same = digest(hooked.site.secret("a", 500))
    hooked.site.encrypt("web/more", hooked.site.secret("more", 100))
    assert hooked.until_run(1) == f"1 {same}"
    (hooked.site.source / "web/more.encrypted").unlink()
    assert hooked.until_run(2) == f"1 {same}"


def test_several_changes_at_once_run_a_hook_once(hooked: Hooked) -> None:
    for number in range(5):
        hooked.site.encrypt(f"web/many-{number}", hooked.site.secret("many", 100))
    assert hooked.until_run(1).partition(" ")[0] == "5"
    hooked.look_twice()
    assert len(hooked.lines) == 1


def test_files_that_do_not_match_or_are_not_served_run_nothing(hooked: Hooked) -> None:
    hooked.site.write("web/README", b"not ciphertext of any kind\n")
    hooked.site.encrypt("other/web", hooked.site.secret("other", 100))
    hooked.look_twice()
    assert hooked.lines == []


def test_what_changed_while_locked_runs_a_hook_after_unlock_and_only_that(hooked: Hooked) -> None:
    hooked.volume.kmsfs("lock", hooked.volume.path)
    hooked.volume.kmsfs("unlock", hooked.volume.path)
    hooked.look_twice()
    assert hooked.lines == []
    hooked.volume.kmsfs("lock", hooked.volume.path)
    new = hooked.site.secret("new", 600)
    hooked.site.encrypt("web/a", new)
    hooked.volume.kmsfs("unlock", hooked.volume.path)
    assert hooked.until_run(1) == f"1 {digest(new)}"


def test_hooks_run_once_after_the_daemon_was_replaced(hooked: Hooked) -> None:
    new = hooked.site.secret("new", 600)
    hooked.site.encrypt("web/a", new)
    hooked.until_run(1)
    wait_until(lambda: hooked.hook()["runs"] == 1, "status shows it")
    old_pid = hooked.volume.status()["daemon_pid"]
    os.kill(old_pid, signal.SIGKILL)
    wait_gone(old_pid)
    assert hooked.until_run(2) == f"0 {digest(new)}"
    wait_until(lambda: hooked.hook()["runs"] == 2, "the new daemon knows of both")


def test_failing_hooks_are_counted_and_shown(site: Site, view: str) -> None:
    site.make_volume()
    site.encrypt("a", site.secret("a", 100))
    volume = mount(site, view, OnChange(match="**", argv=("bash", "-c", "exit 3")))
    assert "hook     **: bash -c exit 3\n    run 0 times, failed 0 times" in shown(volume)
    site.encrypt("a", site.secret("new", 100))
    wait_until(lambda: volume.status()["hooks"][0]["failures"] == 1, "it has failed", _RUN_S)
    assert volume.status()["hooks"] == [
        {
            "match": "**",
            "run": ["bash", "-c", "exit 3"],
            "runs": 1,
            "failures": 1,
            "problem": "exit status 3",
        }
    ]
    assert "run once, failed once\n    the last time: exit status 3\n" in shown(volume)


def shown(volume: MountedVolume) -> str:
    return volume.kmsfs("status", volume.path).output


@pytest.mark.parametrize("how", ["umount", "sigterm", "lazy umount"])
def test_a_hook_that_runs_ends_with_the_mount(
    site: Site, view: str, tmp_path: Path, how: str
) -> None:
    site.make_volume()
    site.encrypt("a", site.secret("a", 100))
    pids = tmp_path / "pids"
    script = f"sleep 300 & echo $$ $! >{pids}.new; mv {pids}.new {pids}; wait"
    volume = mount(site, view, OnChange(match="a", argv=("bash", "-c", script)))
    site.encrypt("a", site.secret("new", 200))
    wait_until(pids.exists, "the hook runs", _RUN_S)
    # The launcher serves all else meanwhile.
    assert len((volume.path / "a").read_bytes()) == 200
    everything = [*processes_of(volume.path), *map(int, pids.read_text().split())]
    assert "sleep" in {process_name(pid) for pid in everything}
    if how == "umount":
        volume.umount()
    elif how == "lazy umount":
        subprocess.run(["umount", "-l", volume.path], check=True)
    else:
        os.kill(volume.launcher_pid, signal.SIGTERM)
    for pid in everything:
        wait_gone(pid)
    assert volume.mount is None


def test_a_mount_without_hooks_watches_nothing(site: Site) -> None:
    site.make_volume()
    site.encrypt("a", site.secret("a", 100))
    daemon_pid = site.mount("--view", "fuse").status()["daemon_pid"]
    fds = Path(f"/proc/{daemon_pid}/fd")
    targets = {os.readlink(fds / name) for name in os.listdir(fds)}
    assert not any("inotify" in target for target in targets)
