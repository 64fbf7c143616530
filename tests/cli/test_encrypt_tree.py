"""`kmsfs encrypt -r`: which files, where to, what is skipped, and what a stopped run leaves."""

import json
import os
import pty
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume, context_of, names_below
from tests.cli.conftest import Commands
from tests.support.strict_kms import StrictKms

LEFT_ALONE = "kmsfs: hint: the plaintext of {} is left alone: remove it when it is not needed"


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


def test_outputs_lie_at_the_same_paths_below_the_output_directory(volume: BulkVolume) -> None:
    volume.write_plain("a.pem", "db/main/password", "db/user")
    done = volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    assert sorted(done.stdout.splitlines()) == [
        b"web/a.pem.encrypted",
        b"web/db/main/password.encrypted",
        b"web/db/user.encrypted",
    ]
    assert done.lines == ["kmsfs: 3 files encrypted", LEFT_ALONE.format("3 files")]
    output = volume.path("db/main/password")
    assert context_of(output)["kmsfs:path"] == "db/main/password"
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert stat.S_IMODE(output.parent.stat().st_mode) == 0o700
    assert volume.operations() == ["GenerateDataKey"] * 3
    for name in ("a.pem", "db/main/password", "db/user"):
        assert volume.decrypt(volume.path(name)) == volume.content(name)


def test_without_an_output_directory_they_lie_beside_and_are_not_encrypted_again(
    volume: BulkVolume,
) -> None:
    for name in ("a", "db/b"):
        path = volume.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(volume.content(name))
    done = volume.kmsfs.good("encrypt", "-r", "web")
    assert done.lines[0] == "kmsfs: 2 files encrypted, 1 skipped (1 kmsfs.toml)"
    done = volume.kmsfs.good("encrypt", "-r", "web")
    assert done.stdout == b""
    assert done.lines[0].startswith("kmsfs: 0 files encrypted, 5 skipped (")
    assert names_below(volume.root) == {
        "kmsfs.toml", "a", "a.encrypted", "db/b", "db/b.encrypted",
    }  # fmt: skip


def test_same_command_encrypts_what_is_new_and_names_what_is_newer(volume: BulkVolume) -> None:
    volume.encrypt("a", "b")
    before = volume.path("a").read_bytes()
    later = volume.path("a").stat().st_mtime + 10
    os.utime(volume.plain / "a", (later, later))
    volume.write_plain("c")
    done = volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    assert done.stdout == b"web/c.encrypted\n"
    assert done.lines == [
        "kmsfs: warning: plain/a: it is newer than web/a.encrypted, which is left as it is",
        "kmsfs: hint: add --force to encrypt again",
        "kmsfs: 1 file encrypted, 2 skipped (2 encrypted before)",
        LEFT_ALONE.format("1 file"),
    ]
    assert volume.path("a").read_bytes() == before
    version = int(context_of(volume.path("a"))["kmsfs:version"])
    done = volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web", "--force")
    assert done.lines[0] == "kmsfs: 3 files encrypted"
    assert int(context_of(volume.path("a"))["kmsfs:version"]) > version


def test_output_that_is_no_ciphertext_is_replaced_only_by_force(volume: BulkVolume) -> None:
    volume.write_plain("a", "b")
    volume.path("a").write_bytes(b"")
    done = volume.kmsfs("encrypt", "-r", "plain", "-o", "web")
    assert done.status == 1
    assert done.lines[:3] == [
        f"kmsfs: error: plain/a: {volume.path('a')} exists already",
        "kmsfs: hint: add --force to replace it",
        "kmsfs: 1 file encrypted, 1 failed",
    ]
    volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web", "--force")
    assert volume.decrypt(volume.path("a")) == volume.content("a")


def test_links_and_special_files_are_named_and_not_followed(volume: BulkVolume) -> None:
    volume.write_plain("a")
    (volume.root.parent / "elsewhere").mkdir()
    (volume.root.parent / "elsewhere" / "b").write_bytes(volume.content("b"))
    (volume.plain / "link").symlink_to("../elsewhere")
    (volume.plain / "file").symlink_to("a")
    os.mkfifo(volume.plain / "pipe")
    done = volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    assert done.lines[:4] == [
        "kmsfs: warning: plain/file is a symbolic link, and not followed",
        "kmsfs: warning: plain/link is a symbolic link, and not followed",
        "kmsfs: warning: plain/pipe is a pipe, and not followed",
        "kmsfs: 1 file encrypted",
    ]
    assert names_below(volume.root) == {"kmsfs.toml", "a.encrypted"}


def test_failures_are_named_and_the_rest_goes_on(volume: BulkVolume) -> None:
    volume.write_plain("a", "b", "c")
    (volume.plain / "caf\udce9").write_bytes(volume.content("b"))
    volume.path("b").mkdir()
    done = volume.kmsfs("encrypt", "-r", "plain", "-o", "web")
    assert done.status == 1
    assert sorted(line for line in done.lines if ": error: " in line) == [
        f"kmsfs: error: plain/b: {volume.path('b')} exists and is not a regular file",
        "kmsfs: error: plain/caf\\udce9: the name b'caf\\xe9' is not UTF-8",
    ]
    assert "kmsfs: 2 files encrypted, 2 failed" in done.lines
    assert names_below(volume.root) == {"kmsfs.toml", "a.encrypted", "c.encrypted"}


def test_refusal_of_kms_names_every_file_and_leaves_no_output(volume: BulkVolume) -> None:
    volume.write_plain("a", "b")
    volume.kms.deny(volume.kms.admin)
    done = volume.kmsfs("encrypt", "-r", "plain", "-o", "web")
    assert done.status == 1
    assert sum(": error: " in line for line in done.lines) == 2
    assert names_below(volume.root) == {"kmsfs.toml"}
    (volume.plain / "b").unlink()
    assert volume.kmsfs("encrypt", "-r", "plain", "-o", "web").status == 4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-r", "-"], "standard input is no directory"),
        (["-r", "missing"], "missing: No such file or directory"),
        (["-r", "plain", "--path", "x"], "--path names standard input; files have their own names"),
        (
            ["-r", "plain", "copy", "-o", "web"],
            "plain/a and copy/a would both become {}/a.encrypted",
        ),
    ],
)
def test_wrong_usage_is_refused_and_leaves_nothing(
    volume: BulkVolume, arguments: list[str], error: str
) -> None:
    volume.write_plain("a")
    (volume.root.parent / "copy").mkdir()
    (volume.root.parent / "copy" / "a").write_bytes(volume.content("a"))
    done = volume.kmsfs("encrypt", *arguments)
    assert done.status == 2
    assert done.lines[0] == f"kmsfs: error: {error.format(volume.root)}"
    assert names_below(volume.root) == {"kmsfs.toml"}


def test_output_directory_within_the_tree_is_left_out(volume: BulkVolume) -> None:
    (volume.root / "in").mkdir()
    (volume.root / "in" / "a").write_bytes(volume.content("a"))
    for _ in range(2):
        volume.kmsfs.good("encrypt", "-r", "web", "-o", "web/out")
    assert names_below(volume.root) == {"kmsfs.toml", "in/a", "out/in/a.encrypted"}


def test_at_most_eight_calls_are_made_at_once(volume: BulkVolume) -> None:
    names = [f"{number:03}" for number in range(100)]
    volume.write_plain(*names)
    volume.kms.latency_s = 0.1
    volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    calls = volume.kms.calls()
    most = max(
        sum(other.started <= call.started < other.ended for other in calls) for call in calls
    )
    assert most == 8
    volume.kms.heal()
    # CHECK


def test_credentials_are_looked_for_once(volume: BulkVolume, tmp_path: Path) -> None:
    env = volume.kmsfs.env
    keys = {
        "Version": 1,
        "AccessKeyId": env.pop("AWS_ACCESS_KEY_ID"),
        "SecretAccessKey": env.pop("AWS_SECRET_ACCESS_KEY"),
    }
    asked = tmp_path / "asked"
    script = tmp_path / "credentials.sh"
    script.write_text(f"#!/bin/sh\necho asked >>{asked}\ncat <<end\n{json.dumps(keys)}\nend\n")
    script.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")
    env["AWS_CONFIG_FILE"] = str(tmp_path / "config")
    volume.write_plain(*(f"{number:02}" for number in range(30)))
    volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    assert asked.read_text() == "asked\n"
    assert len({call.access_key_id for call in volume.kms.calls()}) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_whole_files_and_is_gone_on_with(
    volume: BulkVolume, number: signal.Signals
) -> None:
    names = [f"{n % 7}/{n:03}" for n in range(200)]
    volume.write_plain(*names)
    volume.kms.latency_s = 0.05
    done = volume.interrupted(
        number, lambda: len(volume.kms.calls()) > 40, "encrypt", "-r", "plain", "-o", "web"
    )
    assert done.status == (-number if number is signal.SIGKILL else 128 + number)
    if number is not signal.SIGKILL:
        assert done.lines[-2].startswith("kmsfs: interrupted: ")
        assert done.lines[-1] == "kmsfs: hint: the same command goes on where this one stopped"
    volume.kms.heal()
    written = names_below(volume.root) - {"kmsfs.toml"}
    assert 0 < len(written) < len(names)
    assert written <= {f"{name}.encrypted" for name in names}
    done = volume.kmsfs.good("encrypt", "-r", "plain", "-o", "web")
    assert done.lines[0] == (
        f"kmsfs: {len(names) - len(written)} files encrypted, "
        f"{len(written)} skipped ({len(written)} encrypted before)"
    )
    # CHECK


def test_worker_that_dies_fails_its_file_alone(volume: BulkVolume) -> None:
    names = [f"{n:03}" for n in range(60)]
    volume.write_plain(*names)
    volume.kms.latency_s = 0.2
    process = volume.start("encrypt", "-r", "plain", "-o", "web")
    volume.kms.wait_for_calls(1, timeout_s=60)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    volume.kms.latency_s = 0.0
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert b"the process that worked on it died" in stderr
    assert b"kmsfs: 59 files encrypted, 1 failed" in stderr


def test_progress_is_shown_on_a_terminal_only(volume: BulkVolume) -> None:
    volume.write_plain("a", "b")
    ours, its = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "kmsfs", "encrypt", "-r", "plain", "-o", "web"],
        cwd=volume.kmsfs.directory,
        env={**volume.kmsfs.env, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=its,
        timeout=60,
        check=True,
    )
    os.close(its)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert b"encrypting" in shown
    assert b"2/2" in shown
    assert b"2 files encrypted" in shown
    assert sorted(done.stdout.splitlines()) == [b"web/a.encrypted", b"web/b.encrypted"]
