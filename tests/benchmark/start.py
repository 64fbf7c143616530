"""How long `kmsfs mount` takes until it is ready, beside an empty program of pyfuse3 and trio."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmark.bench import Result, median_ms, running_kms, site_of, timed

_ROUNDS = 15

_EMPTY_PROGRAM = """
import sys, pyfuse3, trio
class Empty(pyfuse3.Operations):
    async def getattr(self, inode, ctx):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode = 1, 0o40755
        return entry
pyfuse3.init(Empty(), sys.argv[1], set(pyfuse3.default_options))
trio.run(pyfuse3.main)
pyfuse3.close()
"""


def measure(directory: Path) -> list[Result]:
    """Alternating starts of both, to the first stat that the mount answers."""
    empty, ours = [], []
    with running_kms() as kms, site_of(kms, directory) as site:
        site.make_volume()
        for number in range(20):
            site.encrypt(f"file-{number}", site.secret(f"file {number}", 1000))
        for _ in range(_ROUNDS):
            empty.append(_start_empty(directory / "empty"))
            mountpoint = directory / "mnt"

            def mount(mountpoint: Path = mountpoint) -> None:
                site.mount(path=mountpoint)
                os.stat(mountpoint)

            ours.append(timed(mount))
            site.mounter.mounted.pop().umount()
    detail = f"empty program {median_ms(empty):.0f} ms, kmsfs {median_ms(ours):.0f} ms"
    return [Result("mount to ready", median_ms(ours) / median_ms(empty), 2.5, "x", detail)]


def _start_empty(mountpoint: Path) -> float:
    mountpoint.mkdir(exist_ok=True)
    device = mountpoint.stat().st_dev
    started = time.perf_counter()
    program = subprocess.Popen([sys.executable, "-c", _EMPTY_PROGRAM, mountpoint])
    while mountpoint.stat().st_dev == device:
        time.sleep(0.0005)
    elapsed = time.perf_counter() - started
    subprocess.run(["umount", mountpoint], check=True)
    program.wait()
    return elapsed
