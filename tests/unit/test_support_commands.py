"""Commands run for tests, and what a machine must have for mounts."""

import pytest

from tests.support import requirements
from tests.support.commands import run_kmsfs
from tests.support.requirements import require_mount
from tests.support.strict_kms import StrictKms


def test_command_runs_as_a_process_in_the_environment_given(strict_kms: StrictKms) -> None:
    done = run_kmsfs(["--version"], env=strict_kms.env())
    assert done.output.startswith("kmsfs")
    assert done.stderr == ""


def test_other_exit_code_than_expected_fails_with_what_was_said(strict_kms: StrictKms) -> None:
    with pytest.raises(AssertionError, match="exit 2"):
        run_kmsfs(["no-such-command"], env=strict_kms.env())
    assert run_kmsfs(["no-such-command"], env=strict_kms.env(), exit_code=2).stderr
    assert run_kmsfs(["no-such-command"], env=strict_kms.env(), exit_code=None).exit_code == 2


def test_machine_without_mounts_skips_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KMSFS_REQUIRE_MOUNT", raising=False)
    monkeypatch.setattr(requirements, "missing_for_mounts", lambda: "/dev/fuse: not here")
    with pytest.raises(pytest.skip.Exception, match="NO MOUNT TESTS"):
        require_mount()


def test_machine_without_mounts_fails_where_they_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KMSFS_REQUIRE_MOUNT", "1")
    monkeypatch.setattr(requirements, "missing_for_mounts", lambda: "/dev/fuse: not here")
    with pytest.raises(pytest.fail.Exception, match="not here"):
        require_mount()


def test_machine_with_mounts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing_for_mounts", lambda: None)
    require_mount(root=False)
