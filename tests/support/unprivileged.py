"""An unprivileged user who may run this checkout and mount, wherever either lies."""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kmsfs import libc
from tests.support.forked import NOBODY

_CHECKOUT = Path(__file__).parents[2]

_END_S = 20.0


@contextlib.contextmanager
def session(commands: Sequence[Sequence[str]], *, env: Mapping[str, str]) -> Iterator[None]:
    """Commands of that user, run one after the other; the block is entered before the last one,
    which runs when the block ends.

    They run in a mount namespace of their own. In it the directories that only root may enter
    are covered by empty ones that hold nothing but this interpreter and checkout, and /dev/fuse
    has the mode that udev gives it. What is mounted there is not seen from outside.

    Raises:
        AssertionError: a command failed.
    """
    as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    *first, last = (shlex.join([*as_user, *command]) for command in commands)
    with tempfile.TemporaryDirectory(prefix="kmsfs-user-", dir="/run") as directory:
        lines = ["set -e", *_preparation(directory), *first, "echo ready", "read -r _ || :", last]
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines)],
            env={**env, "XDG_RUNTIME_DIR": f"{directory}/runtime"},
            cwd=_CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            if process.stdout.readline() == "ready\n":
                yield
        finally:
            _, said = process.communicate(timeout=_END_S)
    assert process.returncode == 0, said


def _preparation(directory: str) -> Iterator[str]:
    """Shell commands of root in the new namespace."""
    needed = [_CHECKOUT, Path(sys.base_prefix), Path(sys.prefix)]
    covered = {path: hidden for path in needed if (hidden := _closed_above(path))}
    yield f"mount -t tmpfs -o mode=755 tmpfs {directory}"
    yield f"install -d -m 700 -o {NOBODY} -g {NOBODY} {directory}/runtime"
    yield f"mknod -m 666 {directory}/fuse c 10 229"
    yield f"mount --bind {directory}/fuse /dev/fuse"
    for number, path in enumerate(covered):
        yield f"mkdir {directory}/{number}"
        yield f"mount --bind {shlex.quote(str(path))} {directory}/{number}"
    for hidden in dict.fromkeys(covered.values()):
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(hidden))}"
    for number, path in enumerate(covered):
        yield f"mkdir -p {shlex.quote(str(path))}"
        yield f"mount --move {directory}/{number} {shlex.quote(str(path))}"


def _closed_above(path: Path) -> Path | None:
    """The topmost directory on the way to a path that others may not enter."""
    for parent in (*reversed(path.parents), path):
        if not parent.stat().st_mode & 0o001:
            return parent
    return None


def become_user() -> None:
    """In a child of root: be that user in every respect, as somebody who has logged in."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # Changing the user takes it away, exec gives it back.
    libc.prctl(libc.PR_SET_DUMPABLE, 1)
