"""The command line as a user runs it: a process of its own, its output watched for plaintext."""

import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import canary

KMSFS = (sys.executable, "-m", "kmsfs")


TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finished:
    """A command that has ended; `stdout` may be plaintext and is no text, and has no repr."""

    arguments: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: str

    def __repr__(self) -> str:
        """What a failed assertion shows."""
        return (
            f"kmsfs {' '.join(self.arguments)}: exit {self.exit_code}, "
            f"{len(self.stdout)} bytes of output, {canary.redact(self.stderr)!r}"
        )

    @property
    def output(self) -> str:
        """Standard output as text."""
        return self.stdout.decode()


def run_kmsfs(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    stdin: bytes = b"",
    cwd: Path | None = None,
    plaintext_on: Collection[str] = (),
    exit_code: int | None = 0,
    prefix: Sequence[str] = (),
) -> Finished:
    """Run `kmsfs ARGUMENTS` to its end.

    Args:
        env: the whole environment, such as `StrictKms.env()`.
        plaintext_on: `stdout`, `stderr`, where plaintext belongs there.
        exit_code: what it must end with; None for whatever.
        prefix: a program to run it under, with its arguments.

    Raises:
        AssertionError: another exit code, or plaintext where none belongs.
    """
    words = tuple(str(argument) for argument in arguments)
    done = subprocess.run(
        [*prefix, *KMSFS, *words],
        env=dict(env),
        input=stdin,
        cwd=cwd,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    stderr = done.stderr.decode(errors="replace")
    finished = Finished(words, done.returncode, done.stdout, stderr)
    canary.check_streams((("stdout", done.stdout), ("stderr", done.stderr)), plaintext_on)
    assert exit_code in (None, finished.exit_code), repr(finished)
    return finished
