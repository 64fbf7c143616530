"""On-change hooks as the launcher runs them: real programs, without a mount."""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.decryptor import wire
from kmsfs.launcher import hooks as launcher_hooks
from kmsfs.launcher.hooks import Hooks
from kmsfs.settings import OnChange
from tests.support.mounts import wait_gone
from tests.support.process_facts import open_fds

_WAIT_S = 20.0


class Running:
    """Hooks under test, and the loop around them."""

    def __init__(self, *argvs: tuple[str, ...]) -> None:
        self.reports: list[wire.HookReport] = []
        table = tuple(OnChange(match="*", argv=argv) for argv in argvs)
        self.hooks = Hooks(table, "/the mountpoint", self.reports.append)

    def until_reported(self, count: int) -> wire.HookReport:
        """Attend to the hooks until so many runs are over; returns the last one's report."""
        self.until(lambda: len(self.reports) >= count)
        return self.reports[-1]

    def until(self, condition: object) -> None:
        assert callable(condition)
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            poll = select.poll()
            for fd in self.hooks.fds():
                poll.register(fd, select.POLLIN)
            pause_ms = self.hooks.pause_ms()
            poll.poll(50 if pause_ms is None else min(pause_ms, 50))
            self.hooks.attend()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_hooks, "_SETTLE_S", 0.1)


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


def test_a_hook_gets_a_clean_environment_and_no_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the administrator")
    seen = tmp_path / "seen"
    script = f"env >{seen}; readlink /proc/$$/fd/0 /proc/$$/fd/2 >>{seen}; ls /proc/$$/fd >>{seen}"
    inherited = os.open("/etc/hosts", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    running = Running(("bash", "-c", script))
    running.hooks.note({0: 3})
    assert running.until_reported(1).failures == 0
    os.close(inherited)
    lines = seen.read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert set(environment) - {"PWD", "SHLVL", "_"} == {
        "PATH",
        "LANG",
        "KMSFS_MOUNTPOINT",
        "KMSFS_CHANGED",
    }
    assert environment["KMSFS_MOUNTPOINT"] == "/the mountpoint"
    assert environment["KMSFS_CHANGED"] == "3"
    assert lines.count("/dev/null") == 2
    numbers = {line for line in lines if line.isdigit()}
    assert str(inherited) not in numbers - {"0", "1", "2"}


def test_arguments_are_handed_over_as_they_are(tmp_path: Path) -> None:
    running = Running(("touch", "--", f"{tmp_path}/$HOME; *"))
    running.hooks.note({0: 1})
    assert running.until_reported(1).failures == 0
    assert os.listdir(tmp_path) == ["$HOME; *"]


def test_a_burst_of_changes_runs_a_hook_once(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    running = Running(("bash", "-c", f"echo $KMSFS_CHANGED >>{counts}"))
    for _ in range(5):
        running.hooks.note({0: 2})
        running.hooks.attend()
    report = running.until_reported(1)
    assert (report.runs, counts.read_text()) == (1, "10\n")
    assert running.hooks.pause_ms() is None


def test_changes_that_never_pause_run_a_hook_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher_hooks, "_MAX_SETTLE_S", 0.3)
    running = Running(("true",))

    def change_and_see() -> bool:
        running.hooks.note({0: 1})
        return bool(running.reports)

    running.until(change_and_see)
    running.hooks.end()


def test_changes_while_a_hook_runs_run_it_once_more_after(tmp_path: Path) -> None:
    go_on, started = tmp_path / "go-on", tmp_path / "started"
    os.mkfifo(go_on)
    running = Running(("bash", "-c", f"echo >>{started}; read line <{go_on}"))
    running.hooks.note({0: 1})
    running.until(started.exists)
    for _ in range(3):
        running.hooks.note({0: 1})
        running.hooks.attend()
    go_on.write_text("\n")
    assert running.until_reported(1).runs == 1
    running.until(lambda: started.read_text() == "\n\n")
    go_on.write_text("\n")
    assert running.until_reported(2).runs == 2
    assert running.hooks.pause_ms() is None


def test_a_hook_that_is_due_while_it_runs_is_not_started_beside_itself(tmp_path: Path) -> None:
    running = Running(("sleep", "60"))
    running.hooks.note({0: 1})
    running.until(lambda: running.hooks.fds() != [])
    first = running.hooks.fds()
    running.hooks.note({0: 1})
    due_at = time.monotonic() + 0.3
    running.until(lambda: time.monotonic() > due_at)
    assert running.hooks.fds() == first
    running.hooks.end()


def test_a_hook_has_no_signal_blocked_and_ignores_none_for_python(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    running = Running(("bash", "-c", f"grep -E '^Sig(Blk|Ign)' /proc/self/status >{masks}"))
    running.hooks.note({0: 1})
    # Like the launcher: Python ignores two, and whoever started it may have blocked others.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        running.until_reported(1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    found = {line.split()[0]: int(line.split()[1], 16) for line in masks.read_text().splitlines()}
    assert found["SigBlk:"] == 0
    assert not found["SigIgn:"] & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_a_hook_that_runs_holds_no_other_up(tmp_path: Path) -> None:
    running = Running(("sleep", "60"), ("true",))
    running.hooks.note({0: 1, 1: 1})
    assert running.until_reported(1).hook == 1
    running.hooks.end()


def test_a_hook_that_takes_too_long_is_killed_with_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_hooks, "TIMEOUT_S", 0.5)
    pids = tmp_path / "pids"
    running = Running(("bash", "-c", f"sleep 60 & echo $$ $! >{pids}; trap '' TERM; wait"))
    running.hooks.note({0: 1})
    report = running.until_reported(1)
    assert (report.failures, report.problem) == (1, "killed: it took more than 0 s")
    for pid in pids.read_text().split():
        wait_gone(int(pid))


def test_a_hook_that_has_left_its_group_is_killed_and_awaited_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_hooks, "TIMEOUT_S", 0.5)
    left = tmp_path / "left"
    leave = f"os.setpgid(0, {os.getpgid(0)}); open({str(left)!r}, 'w').close(); time.sleep(60)"
    running = Running((sys.executable, "-c", f"import os, time; {leave}"))
    running.hooks.note({0: 1})
    running.until(left.exists)
    (pidfd,) = running.hooks.fds()

    def is_killed() -> bool:
        return bool(select.select([pidfd], [], [], 0)[0])

    deadline = time.monotonic() + _WAIT_S
    while not is_killed():
        assert time.monotonic() < deadline
        running.hooks.attend()
        if not is_killed() and running.hooks.pause_ms() is None:
            # Killed, and all there is to wait for is its end.
            select.select([pidfd], [], [], _WAIT_S)
    assert running.until_reported(1).failures == 1


def test_once_a_hook_is_killed_only_its_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_hooks, "TIMEOUT_S", 0.0)
    monkeypatch.setattr(launcher_hooks, "_kill_group", lambda _child: None)
    running = Running(("sleep", "0.5"))
    running.hooks.note({0: 1})
    running.until(lambda: running.hooks.fds() != [])
    running.hooks.attend()
    assert running.hooks.pause_ms() is None
    assert "took more than" in running.until_reported(1).problem


def test_what_a_hook_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    running = Running(("bash", "-c", f"sleep 60 & echo $! >{pids}"))
    running.hooks.note({0: 1})
    assert running.until_reported(1).failures == 0
    wait_gone(int(pids.read_text()))


def test_the_end_of_the_mount_ends_what_runs(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    running = Running(
        ("bash", "-c", f"sleep 60 & echo $$ $! >{pids}.new; mv {pids}.new {pids}; wait")
    )
    running.hooks.note({0: 1})
    running.until(pids.exists)
    running.hooks.note({0: 1})
    running.hooks.end()
    for pid in pids.read_text().split():
        wait_gone(int(pid))
    assert running.hooks.pause_ms() is None
    assert running.reports == []


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("false",), "exit status 1"),
        (("bash", "-c", "kill -TERM $$"), "ended by signal 15"),
        (("/no/such/program",), "there is no such program"),
        (("no-such-program",), "there is no such program"),
    ],
)
def test_failures_are_counted_and_said(argv: tuple[str, ...], problem: str) -> None:
    running = Running(argv)
    for count in (1, 2):
        running.hooks.note({0: 1})
        report = running.until_reported(count)
        assert (report.runs, report.failures, report.problem) == (count, count, problem)


def test_a_run_that_goes_well_takes_the_problem_back(tmp_path: Path) -> None:
    running = Running(("test", "-e", str(tmp_path / "there")))
    running.hooks.note({0: 1})
    assert running.until_reported(1).problem == "exit status 1"
    (tmp_path / "there").touch()
    running.hooks.note({0: 1})
    report = running.until_reported(2)
    assert (report.runs, report.failures, report.problem) == (2, 1, "")


def test_a_new_daemon_is_told_what_ran_and_every_hook_runs() -> None:
    running = Running(("true",), ("true",))
    running.hooks.note({1: 1})
    running.until_reported(1)
    running.hooks.report_all()
    assert [report.hook for report in running.reports] == [1, 1]
    running.hooks.note_all()
    running.until_reported(4)
    assert {report.hook for report in running.reports[2:]} == {0, 1}


def test_a_number_that_no_hook_has_runs_nothing() -> None:
    running = Running(("true",))
    running.hooks.note({1: 1, -1: 1})
    assert running.hooks.pause_ms() is None
