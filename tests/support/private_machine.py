"""Shell sessions that may write where a machine's own configuration and programs are.

A session runs in a mount namespace of its own, in which `PLACES` are overlays whose changes are
kept in memory. What it writes and mounts there is seen by nobody else, and gone when it ends.
"""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PLACES = ("/etc", "/opt", "/run", "/usr/local")

_SESSION = """\
set -o pipefail
kmsfs_mounts() {{
    awk '/ - (fuse.kmsfs|ramfs kmsfs:|tmpfs kmsfs:)/{{print $5}}' /proc/self/mountinfo
}}
# Copies of what is mounted elsewhere would hold that.
for mount in $(kmsfs_mounts); do umount -l $mount; done
mount -t tmpfs tmpfs {layers}
for place in {places}; do
    mkdir -p {layers}/upper$place {layers}/work$place
    mount -t overlay overlay $place \\
        -o lowerdir=$place,upperdir={layers}/upper$place,workdir={layers}/work$place || exit 99
done
for number in $(seq 0 {last}); do
    eval "$(cat {results}/$number.command)" \\
        </dev/null >{results}/$number.stdout 2>{results}/$number.stderr
    status=$?
    echo $status >{results}/$number.status
    [ $status = 0 ] || break
done
kmsfs_mounts >{results}/mounts
for mount in $(kmsfs_mounts); do umount -l $mount; done
exit 0
"""


@dataclass(frozen=True)
class Ran:
    """A command of a session that has ended. Its standard output may be plaintext: no repr."""

    command: str
    status: int
    stdout: bytes
    stderr: str

    def __repr__(self) -> str:
        """What a failed assertion shows."""
        return f"{self.command}: exit {self.status}, {self.stderr!r}"


@dataclass(frozen=True)
class Session:
    """The commands that ran, and mountpoints of kmsfs that were left at the end."""

    ran: tuple[Ran, ...]
    left_mounted: tuple[str, ...]

    def of(self, start: str) -> Ran:
        """The one command that begins like this."""
        (found,) = [ran for ran in self.ran if ran.command.startswith(start)]
        return found


def run_session(
    commands: Sequence[str],
    *,
    directory: Path,
    env: Mapping[str, str],
    cwd: Path,
    timeout_s: float,
) -> Session:
    """Run commands one after the other in one bash, as root, until one fails.

    Args:
        directory: an empty one, for what the session says.
        env: the whole environment.
    """
    layers, results = directory / "layers", directory / "results"
    layers.mkdir()
    results.mkdir()
    for number, command in enumerate(commands):
        (results / f"{number}.command").write_text(command)
    script = _SESSION.format(
        layers=shlex.quote(str(layers)),
        results=shlex.quote(str(results)),
        places=" ".join(PLACES),
        last=len(commands) - 1,
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = []
    for number, command in enumerate(commands):
        if not (results / f"{number}.status").exists():
            break
        ran.append(
            Ran(
                command,
                int((results / f"{number}.status").read_text()),
                (results / f"{number}.stdout").read_bytes(),
                (results / f"{number}.stderr").read_text(errors="replace"),
            )
        )
    return Session(tuple(ran), tuple((results / "mounts").read_text().splitlines()))
