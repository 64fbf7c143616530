"""kill -9 before and after every step of replacing a file: the old one or the new one is there."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmsfs.manage import output
from kmsfs.manage.original import read_original
from kmsfs.manage.output import write_file
from tests.cli.test_output import open_without_tmpfile

OLD, NEW = b"old" * 100, b"new" * 100

STEPS = ("open", "fchmod", "write", "fsync", "link", "rename", "close")


def killed(at: int, *, replace: bool, path: Path, nameless: bool) -> bool:
    """Have a child replace a file and die at one of its steps; whether it did die."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    try:
        left = at
        if not nameless:
            setattr(os, "open", open_without_tmpfile)  # noqa: B010

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                for before in (True, False):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if before:
                        done = real(*arguments, **options)
                return done

            return step

        like = read_original(path, max_bytes=1 << 20) if replace else None
        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        write_file(path, NEW, replace=replace, like=like)
    finally:
        os._exit(0)


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_file_is_whole_at_every_step(tmp_path: Path, *, replace: bool, nameless: bool) -> None:
    path = tmp_path / "file"
    seen = []
    at = 1
    while True:
        for left_behind in tmp_path.iterdir():
            left_behind.unlink()
        if replace:
            path.write_bytes(OLD)
        died = killed(at, replace=replace, path=path, nameless=nameless)
        content = path.read_bytes() if path.exists() else b""
        assert content in ((OLD if replace else b""), NEW), at
        seen.append(content)
        others = {found.name for found in tmp_path.iterdir()} - {"file"}
        assert all(output.is_temporary_name(name) for name in others), others
        if not died:
            break
        at += 1
    assert at > 12, "it was killed at every step"
    assert seen == sorted(seen, key=lambda content: content == NEW), "once new, always new"
    assert seen[-1] == NEW
    assert others == set()
