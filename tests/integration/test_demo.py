"""`./contrib/demo`, as the README tells everybody to try it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kmsfs.views import mountpoint as mounts
from tests.support.readme import ROOT

_TIMEOUT_S = 600


def run_demo(temporary: Path) -> str:
    """Run it to its end; returns what it said."""
    done = subprocess.run(
        [ROOT / "contrib/demo"],
        cwd="/",
        env={**os.environ, "TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def mounts_below(directory: Path) -> Iterator[str]:
    for mount in mounts.mount_table():
        if Path(mount.mountpoint).is_relative_to(directory):
            yield mount.mountpoint


def test_demo_shows_what_it_did_and_leaves_nothing_twice(mountable: None, tmp_path: Path) -> None:
    for _ in range(2):
        said = run_demo(tmp_path)

        assert "Key is valid" in said
        assert "store.bin: 300000 bytes" in said
        assert said.count("$ kmsfs") == 6
        assert "What happened: three files were encrypted" in said
        assert list(mounts_below(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []


def test_demo_cleans_up_when_it_fails(mountable: None, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "cmp").write_text("#!/bin/sh\necho refused; exit 1\n")
    (programs / "cmp").chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    done = subprocess.run(
        [ROOT / "contrib/demo"],
        env={**os.environ, "TMPDIR": str(temporary), "PATH": f"{programs}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 1
    assert "refused" in done.stdout
    assert "What happened" not in done.stdout
    assert list(mounts_below(temporary)) == []
    assert list(temporary.iterdir()) == []


def test_demo_cleans_up_though_it_is_terminated_meanwhile(mountable: None, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    asked = programs / "mountpoint"
    asked.write_text(f'#!/bin/sh\nkill -TERM $PPID\nexec {shutil.which("mountpoint")} "$@"\n')
    asked.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    done = subprocess.run(
        [ROOT / "contrib/demo"],
        env={**os.environ, "TMPDIR": str(temporary), "PATH": f"{programs}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
