"""Changes to the machine are undone whatever becomes of the test that made them."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.machine import RefusedError, changed, kernel_setting
from tests.support.mounts import wait_until


def test_a_setting_is_put_back_after_a_failure(tmp_path: Path) -> None:
    setting = tmp_path / "it's a setting"
    setting.write_text("|/bin/before %p\n")
    seen = ""
    with contextlib.suppress(ZeroDivisionError), kernel_setting(setting, "$(after) 'x'"):
        seen = setting.read_text()
        raise ZeroDivisionError
    assert seen == "$(after) 'x'\n"
    assert setting.read_text() == "|/bin/before %p\n"


def test_a_setting_is_put_back_although_the_test_run_is_killed(tmp_path: Path) -> None:
    setting = tmp_path / "setting"
    setting.write_text("before\n")

    def be_killed() -> bool:
        with kernel_setting(setting, "after"):
            signal.pause()
        return True

    pid = forked.start(be_killed)
    wait_until(lambda: setting.read_text() == "after\n", "it is changed")
    os.kill(pid, signal.SIGKILL)
    assert forked.wait(pid) == -signal.SIGKILL
    wait_until(lambda: setting.read_text() == "before\n", "it is put back")


def test_a_change_that_is_refused_is_not_undone_and_says_why(tmp_path: Path) -> None:
    undone = tmp_path / "undone"
    with (
        pytest.raises(RefusedError, match="no such thing"),
        changed("(echo no such thing >&2; false)", f"touch {undone}"),
    ):
        raise AssertionError
    assert not undone.exists()


def test_a_change_that_cannot_be_undone_fails_the_test() -> None:
    with (
        pytest.raises(AssertionError, match="cannot be"),
        changed("true", "echo cannot be >&2; false"),
    ):
        pass
