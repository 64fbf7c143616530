"""What `encrypt -r` and `reencrypt` write, seen by strace over a whole run of all processes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.bulk_volume import BulkVolume
from tests.cli.conftest import Commands
from tests.support import canary
from tests.support.strict_kms import StrictKms

_WRITES = "write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendfile,splice,copy_file_range"
_CREATES = "open,openat,openat2,creat,mknod,mknodat,memfd_create"

_NAMES = ("a.pem", "db/main/password", "db/user")

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@pytest.fixture
def volume(strict_kms: StrictKms, bare_kmsfs: Commands) -> BulkVolume:
    return BulkVolume.make(strict_kms, bare_kmsfs)


def traced(volume: BulkVolume, *arguments: str | Path) -> list[str]:
    """The system calls of a command that must succeed."""
    trace = volume.root.parent / "trace.out"
    subprocess.run(
        [*("strace", "-f", "-y", "-s", "1000000", "-e", f"trace={_WRITES},{_CREATES}")]
        + ["-o", trace, sys.executable, "-B", "-m", "kmsfs", *arguments],
        cwd=volume.kmsfs.directory,
        env=volume.kmsfs.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=True,
    )
    lines = trace.read_text(errors="replace").splitlines()
    trace.unlink()
    return lines


def with_plaintext(lines: list[str]) -> list[str]:
    """Calls that wrote plaintext anywhere: to a file, a pipe or a socket."""
    return [canary.redact(line)[:200] for line in lines if canary.carries(line)]


def created_elsewhere(lines: list[str], directory: Path) -> list[str]:
    """Files that were opened for creation, but for those below a directory."""
    made = [line for line in lines if re.search(r"O_CREAT|O_TMPFILE|memfd_create", line)]
    assert made, "nothing was created, or strace does not show it"
    return [line for line in made if f"<{directory}" not in line and f'"{directory}' not in line]


def test_encrypting_a_tree_writes_no_plaintext_anywhere(volume: BulkVolume) -> None:
    volume.write_plain(*_NAMES)
    lines = traced(volume, "encrypt", "-r", "plain", "-o", "web")
    assert with_plaintext(lines) == []
    assert created_elsewhere(lines, volume.root) == []
    volume.check(*_NAMES)


def test_reencrypting_writes_no_plaintext_anywhere(volume: BulkVolume) -> None:
    volume.encrypt(*_NAMES)
    volume.blob("old")
    lines = traced(volume, "reencrypt", "web", "--key-id", volume.other.arn)
    assert with_plaintext(lines) == []
    assert created_elsewhere(lines, volume.root) == []
    volume.check(*_NAMES, "old")


def test_what_is_written_does_show(volume: BulkVolume) -> None:
    """The two tests above could fail."""
    volume.encrypt(*_NAMES)
    lines = traced(volume, "decrypt", "-r", "web", "-o", "shown", "--force")
    assert len(with_plaintext(lines)) == len(_NAMES)
    assert len(created_elsewhere(lines, volume.root)) == len(_NAMES)
