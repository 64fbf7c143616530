"""Where the kernel puts cores: in a directory of a test's own, as files or through a program."""

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.support.machine import RefusedError, exclusive, kernel_setting

_PATTERN = Path("/proc/sys/kernel/core_pattern")

# How many programs that take cores the kernel waits for; with 0 a process is gone before its
# core is written.
_PIPE_LIMIT = Path("/proc/sys/kernel/core_pipe_limit")

_TAKER = """#!/bin/sh
exec cat > {directory}/core.$1
"""


@dataclass(frozen=True)
class Cores:
    """The cores that were written while this was in force, of whatever process."""

    directory: Path

    def of(self, pid: int) -> Path | None:
        """A process's core; None if it left none. To be asked once the process is gone."""
        path = self.directory / f"core.{pid}"
        return path if path.exists() else None


@contextlib.contextmanager
def cores(how: Literal["file", "pipe"]) -> Iterator[Cores]:
    """Have the kernel write cores to files, or hand them to a program on its standard input.

    The test is skipped where the machine does not allow that to be set. The setting is the whole
    machine's, and put back in every case.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive("cores"))
        # Its path has to be short: the kernel takes 127 characters.
        directory = Path(tempfile.mkdtemp(prefix="kmsfs-cores-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, directory)
        taker = directory / "take"
        taker.write_text(_TAKER.format(directory=shlex.quote(str(directory))))
        taker.chmod(0o700)
        pattern = f"{directory}/core.%p" if how == "file" else f"|{taker} %p"
        try:
            stack.enter_context(kernel_setting(_PIPE_LIMIT, "16"))
            stack.enter_context(kernel_setting(_PATTERN, pattern))
        except (RefusedError, OSError) as error:
            pytest.skip(f"NO CORE TESTS ON THIS MACHINE: {error}")
        yield Cores(directory)
