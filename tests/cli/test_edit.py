"""`kmsfs edit`: plaintext in a ramfs that nobody else sees, the same key, and nothing lost."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Commands, Done
from tests.support.canary import carries, secret
from tests.support.forked import NOBODY

TEXT = secret("edited", 60)

# What an editor does is one shell command; "$1" is the file.
_EDITOR = "sh -c {} editor"


@pytest.fixture
def file(mountable: None, kmsfs: Commands, volume: Path) -> Path:
    """A file of a volume, bound to its place."""
    kmsfs.good("encrypt", "-", "--path", "password", "-o", f"{volume}/", stdin=TEXT)
    return volume / "password.encrypted"


def edit(kmsfs: Commands, file: Path, script: str, *arguments: str) -> Done:
    kmsfs.env["EDITOR"] = _EDITOR.format(shlex.quote(script))
    before = private_directories()
    done = kmsfs("edit", file, *arguments)
    assert private_directories() == before
    return done


def private_directories() -> set[str]:
    return {name for name in os.listdir("/run") if name.startswith("kmsfs-private-")}


def content_of(kmsfs: Commands, file: Path) -> bytes:
    return kmsfs.good("decrypt", file).stdout


def context_of(kmsfs: Commands, file: Path) -> dict[str, str]:
    (record,) = json.loads(kmsfs.good("inspect", "--json", file).stdout)
    context: dict[str, str] = record["encryption_context"]
    return context


def test_what_is_saved_is_encrypted_to_the_same_place_with_a_higher_version(
    kmsfs: Commands, file: Path
) -> None:
    before = context_of(kmsfs, file)
    file.chmod(0o640)
    done = edit(kmsfs, file, 'printf " and more" >>"$1"')
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.decode() == f"{file}: encrypted again\n"
    assert content_of(kmsfs, file) == TEXT + b" and more"
    after = context_of(kmsfs, file)
    assert int(after.pop("kmsfs:version")) > int(before.pop("kmsfs:version"))
    # Each message has a key of its own for its signature.
    for context in (before, after):
        context.pop("aws-crypto-public-key")
    assert after == before
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_replaced_by_its_editor_is_saved_too(kmsfs: Commands, file: Path) -> None:
    script = 'cp "$1" "$1~" && sed s/canary/CANARY/ "$1~" >"$1.new" && echo x >>"$1.new" '
    done = edit(kmsfs, file, script + '&& mv "$1.new" "$1"')
    assert done.status == 0, done.stderr
    assert content_of(kmsfs, file).endswith(b"x\n")


def test_nothing_is_written_where_nothing_was_changed(kmsfs: Commands, file: Path) -> None:
    before = file.stat()
    done = edit(kmsfs, file, 'cp "$1" "$1.new" && mv "$1.new" "$1"')
    assert (done.status, done.stdout.decode()) == (0, f"{file}: not changed\n")
    assert file.stat() == before or file.stat().st_mtime_ns == before.st_mtime_ns


def test_the_editor_can_write_nowhere_but_beside_its_file(
    kmsfs: Commands, file: Path, tmp_path: Path
) -> None:
    places = [tmp_path, Path("/tmp"), Path("/var/tmp"), Path("/run"), Path("/dev/shm"), file.parent]
    tries = "; ".join(f'cp "$1" {place}/kmsfs-leak 2>/dev/null && exit 9' for place in places)
    done = edit(kmsfs, file, f'{tries}; cp "$1" "$TMPDIR/backup" && echo >/dev/null')
    assert done.status == 0, done.stderr
    for place in places:
        assert not (place / "kmsfs-leak").exists()


def test_it_lies_on_a_ramfs_that_others_do_not_see(
    kmsfs: Commands, file: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kmsfs.env["EDITOR"] = _EDITOR.format(
        shlex.quote(f'{{ stat -f -c %T "$1"; echo "$1"; }} >{fifo}; read _ <{fifo}')
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", "edit", file],
        env=kmsfs.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    with fifo.open() as reader:
        kind, path = reader.read().splitlines()
    assert kind == "ramfs"
    assert path.endswith("/password")
    assert not Path(path).exists()
    assert Path(path).parent.is_dir()
    fifo.write_text("go on\n")
    assert command.communicate(timeout=20)[0] == f"{file}: not changed\n".encode()


@pytest.mark.parametrize(
    ("script", "how"), [("exit 3", "status 3"), ("kill -9 $$", "signal 9")], ids=["fails", "killed"]
)
def test_an_editor_that_fails_changes_nothing(
    kmsfs: Commands, file: Path, script: str, how: str
) -> None:
    before = file.read_bytes()
    done = edit(kmsfs, file, f'echo more >>"$1"; {script}')
    assert done.status == 2
    assert done.stderr == (f"kmsfs: error: sh ended with {how}\nkmsfs: hint: nothing was changed\n")
    assert file.read_bytes() == before


def test_an_editor_that_is_not_there_is_said(kmsfs: Commands, file: Path) -> None:
    kmsfs.env["VISUAL"] = "no-such-editor --flag"
    done = kmsfs("edit", file)
    assert done.status == 2
    assert done.stderr == (
        "kmsfs: error: there is no program no-such-editor\n"
        "kmsfs: hint: set EDITOR to one that is there\n"
    )


def test_a_file_that_somebody_else_changed_meanwhile_is_left_to_them(
    kmsfs: Commands, file: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kmsfs.env["EDITOR"] = _EDITOR.format(
        shlex.quote(f'echo >{fifo}; read _ <{fifo}; echo mine >>"$1"')
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", "edit", file],
        env=kmsfs.env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    fifo.read_text()
    theirs = secret("theirs", 30)
    del kmsfs.env["EDITOR"]
    kmsfs.good(
        "encrypt", "-", "--path", "password", "-o", f"{file.parent}/", "--force", stdin=theirs
    )
    fifo.write_text("go on\n")
    _, errors = command.communicate(timeout=20)
    assert b"was changed by somebody else meanwhile" in errors
    assert command.returncode != 0
    assert content_of(kmsfs, file) == theirs


def test_a_bare_blob_stays_one_and_says_if_it_grows_too_large(
    kmsfs: Commands, volume: Path, mountable: None
) -> None:
    kmsfs.good("encrypt", "-", "--raw", "--path", "blob", "-o", f"{volume}/", stdin=TEXT)
    file = volume / "blob.encrypted"
    assert edit(kmsfs, file, 'echo more >>"$1"').status == 0
    # An Encryption SDK message would be larger.
    assert file.stat().st_size < 400
    assert content_of(kmsfs, file) == TEXT + b"more\n"
    before = file.read_bytes()
    done = edit(kmsfs, file, 'head -c 5000 /dev/zero >>"$1"')
    assert done.status == 2
    assert "takes 4096 at most" in done.stderr
    assert file.read_bytes() == before


def test_a_kms_that_is_away_when_it_is_saved_leaves_the_file_whole(
    kmsfs: Commands, file: Path
) -> None:
    before = file.read_bytes()
    kmsfs.env["AWS_MAX_ATTEMPTS"] = "1"
    # The editor's own environment is the command's; the server is one of the session's.
    done = edit(kmsfs, file, 'echo more >>"$1"', "--endpoint-url", "http://127.0.0.1:9")
    assert done.status == 5
    assert file.read_bytes() == before


def test_killed_in_the_middle_it_leaves_the_file_whole_and_nothing_mounted(
    kmsfs: Commands, file: Path, tmp_path: Path
) -> None:
    before = file.read_bytes()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kmsfs.env["EDITOR"] = _EDITOR.format(
        shlex.quote(f'echo more >>"$1"; echo $$ "$1" >{fifo}; exec sleep 60')
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", "edit", file], env=kmsfs.env, stdin=subprocess.DEVNULL
    )
    pid, path = fifo.read_text().split()
    command.send_signal(signal.SIGKILL)
    command.wait(20)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        # Killed with its parent; then it is ours to reap.
        os.waitpid(int(pid), 0)
        assert time.monotonic() < deadline
    assert file.read_bytes() == before
    left = Path(path).parent
    assert list(left.iterdir()) == []
    left.rmdir()


def test_only_root_can(kmsfs: Commands, file: Path) -> None:
    for directory in (file.parent, *file.parent.parents):
        if directory.owner() == "root" and str(directory).startswith(
            ("/tmp/", str(kmsfs.directory))
        ):
            directory.chmod(0o755)
    file.chmod(0o644)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(NOBODY), file],
        env=kmsfs.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert "only root can mount one" in done.stderr


_AS_NOBODY = """
import os, sys
from kmsfs import cli
from kmsfs.cli import edit
import kmsfs.manage.edit, kmsfs.manage.private_ram, kmsfs.cli.protection
uid = int(sys.argv[1])
os.setresuid(uid, uid, uid)
sys.exit(cli.run(["edit", sys.argv[2]]))
"""


def test_no_plaintext_is_written_but_to_the_ramfs(
    kmsfs: Commands, file: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    kmsfs.env["EDITOR"] = _EDITOR.format(shlex.quote('cp "$1" "$1~"; echo more >>"$1"'))
    done = subprocess.run(
        ["strace", "-f", "-yy", "-s", "100000", "-o", trace]
        + ["-e", "trace=write,pwrite64,writev,pwritev,sendto,sendmsg,copy_file_range,sendfile"]
        + [sys.executable, "-m", "kmsfs", "edit", file],
        env=kmsfs.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = trace.read_text(errors="replace").splitlines()
    trace.unlink()
    calls = [re.match(r"\d+ +\w+\(\d+<([^>]*)>", line) for line in lines]
    wrote = {
        call[1]
        for call, line in zip(calls, lines, strict=True)
        if call is not None and carries(line)
    }
    assert wrote
    assert {re.sub(r"kmsfs-private-\w+/.*", "", place) for place in wrote} == {"/run/"}
