"""What the launcher starts gets its descriptors and its environment, and nothing else."""

import json
import os
import socket
from pathlib import Path

import msgspec
import pytest

from kmsfs.launcher import children
from kmsfs.memory.process import SCRUBBING_ENVIRONMENT
from kmsfs.settings import KmsSettings

# Writes what it finds to the file named by its last argument.
_REPORTER = """
import json, os, sys
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[int(name)] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass
passed = [os.read(int(fd), 100).decode() for fd in sys.argv[1:-1]]
with open(sys.argv[-1], "w") as file:
    json.dump({"fds": fds, "argv": sys.argv[1:], "passed": passed, "env": dict(os.environ)}, file)
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_child_has_its_descriptors_and_no_other(tmp_path: Path, quiet: bool) -> None:
    (tmp_path / "reporter.py").write_text(_REPORTER)
    report = tmp_path / "report"
    inherited = os.open("/etc/hosts", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    files = []
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
        files.append(os.open(tmp_path / name, os.O_RDONLY | os.O_CLOEXEC))
    child = children.spawn(
        "reporter",
        files,
        [str(report)],
        {"PYTHONPATH": str(tmp_path), "MARK": "x"},
        quiet=quiet,
    )
    assert child.wait(20) == 0
    for fd in (*files, inherited):
        os.close(fd)
    found = json.loads(report.read_text())
    assert found["passed"] == ["one", "two", "three"]
    assert set(found["env"]) - {"LC_CTYPE"} == {"PYTHONPATH", "MARK"}
    streams = [found["fds"].pop(str(fd)) for fd in (0, 1, 2)]
    assert streams[0] == "/dev/null"
    assert not quiet or streams == ["/dev/null"] * 3
    for fd in found["argv"][:-1]:
        found["fds"].pop(fd)
    assert "/etc/hosts" not in found["fds"].values()
    # What is left is the report's own and that of the listing.
    assert len(found["fds"]) <= 1


def test_a_child_that_does_not_end_is_told_apart_from_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import signal; signal.pause()")
    ours, theirs = socket.socketpair()
    child = children.spawn(
        "sleeper", [theirs.fileno()], [], {"PYTHONPATH": str(tmp_path)}, quiet=True
    )
    theirs.close()
    assert child.wait(0) is None
    child.kill(children.signal.SIGKILL)
    assert child.wait(20) == -9
    assert ours.recv(1) == b""
    ours.close()


def test_the_zygote_sees_what_the_aws_libraries_look_at_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    wanted = {"AWS_PROFILE": "p", "HOME": "/h", "HTTPS_PROXY": "x", "no_proxy": "y"}
    for name, value in {
        **wanted,
        "LD_PRELOAD": "evil.so",
        "PYTHONPATH": "/e",
        "TOKEN": "t",
    }.items():
        monkeypatch.setenv(name, value)
    found = children.zygote_environment()
    assert found.pop("PATH")
    assert found == {**wanted, **SCRUBBING_ENVIRONMENT}
    assert "AWS_PROFILE" not in children.daemon_environment()


def test_a_record_travels_in_memory_and_leaves_nothing_open() -> None:
    settings = KmsSettings(key_ids=("arn",), region="eu-central-1")
    with children.memory_file(settings) as fd:
        assert msgspec.json.decode(os.read(fd, 10_000), type=KmsSettings) == settings
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
