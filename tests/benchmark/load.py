"""Sixteen readers over 500 files, beside eight processes that call boto3 themselves."""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmark.bench import Kms, Result, read_whole, running_kms, site_of
from tests.support.sites import Site

_FILES = 500
_READERS = 16
_BOTO3_PROCESSES = 8
_LATENCY_MS = 15
_SLOW_MS = 1500
_ROUNDS = 3

# Reads blobs, waits for a line, decrypts its share of them, and says so.
_BOTO3_PROGRAM = """
import sys
from pathlib import Path
import botocore.session
from botocore.config import Config
endpoint, region, key, *paths = sys.argv[1:]
client = botocore.session.Session().create_client(
    "kms", region_name=region, endpoint_url=endpoint, config=Config(tcp_keepalive=True))
blobs = [Path(path).read_bytes() for path in paths]
print("ready", flush=True)
sys.stdin.readline()
for blob in blobs:
    client.decrypt(CiphertextBlob=blob, KeyId=key)
print("done", flush=True)
"""


def measure(directory: Path) -> list[Result]:
    """Throughput on bare blobs, and what one slow file costs the others."""
    results = []
    with running_kms("--latency-ms", str(_LATENCY_MS)) as kms:
        results.append(_throughput(kms, directory / "many"))
    slow = f"kmsfs:path=file-250:{_SLOW_MS}"
    with running_kms("--latency-ms", str(_LATENCY_MS), "--slow-context", slow) as kms:
        results.append(_one_slow(kms, directory / "slow"))
    return results


def _throughput(kms: Kms, directory: Path) -> Result:
    with site_of(kms, directory) as site:
        for number in range(_FILES):
            site.write(
                f"file-{number:03}.encrypted", site.blob(site.secret(f"file {number}", 1000))
            )
        site.write("warm-up.encrypted", site.blob(site.secret("warm-up", 1000)))
        boto3, ours = [], []
        for _ in range(_ROUNDS):
            boto3.append(_boto3_time(kms, site))
            volume = site.mount()
            # The processes of boto3 have their imports behind them too when the clock starts.
            read_whole(volume.path / "warm-up")
            ours.append(_read_all([volume.path / f"file-{n:03}" for n in range(_FILES)])[0])
            site.mounter.mounted.pop().umount()
    detail = (
        f"{_FILES} files: boto3 in {_BOTO3_PROCESSES} processes {statistics.median(boto3):.2f} s, "
        f"{_READERS} readers {statistics.median(ours):.2f} s"
    )
    ratio = statistics.median(ours) / statistics.median(boto3)
    return Result("500 files, 16 readers", ratio, 1.3, "x", detail)


def _one_slow(kms: Kms, directory: Path) -> Result:
    """The slowest of all other files, with one that takes much longer among them."""
    with site_of(kms, directory) as site:
        site.make_volume()
        for number in range(_FILES):
            site.encrypt(f"file-{number}", site.secret(f"file {number}", 1000))
        names = [f"file-{n}" for n in range(_FILES)]
        volume = site.mount()
        _, with_slow = _read_all([volume.path / name for name in names])
        site.mounter.mounted.pop().umount()
        volume = site.mount()
        others = [name for name in names if name != "file-250"]
        _, without_slow = _read_all([volume.path / name for name in others])
    slow = with_slow.pop(volume.path / "file-250")
    slowest, slowest_without = max(with_slow.values()), max(without_slow.values())
    detail = (
        f"the slow file {slow:.2f} s; slowest of the others {slowest * 1000:.0f} ms with it, "
        f"{slowest_without * 1000:.0f} ms without; medians "
        f"{statistics.median(with_slow.values()) * 1000:.0f} and "
        f"{statistics.median(without_slow.values()) * 1000:.0f} ms"
    )
    ratio = statistics.median(with_slow.values()) / statistics.median(without_slow.values())
    return Result("other files beside a slow one", ratio, 1.3, "x", detail)


def _boto3_time(kms: Kms, site: Site) -> float:
    paths = sorted(site.source.glob("file-*.encrypted"))
    region = kms.env["AWS_DEFAULT_REGION"]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", _BOTO3_PROGRAM, kms.endpoint_url, region, site.key_arn]
            + [str(path) for path in paths[first::_BOTO3_PROCESSES]],
            env=dict(kms.env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for first in range(_BOTO3_PROCESSES)
    ]
    for program in programs:
        assert program.stdout is not None
        program.stdout.readline()
    started = time.perf_counter()
    for program in programs:
        assert program.stdin is not None
        program.stdin.write(b"go\n")
        program.stdin.flush()
    for program in programs:
        assert program.stdout is not None
        program.stdout.readline()
    elapsed = time.perf_counter() - started
    for program in programs:
        program.communicate()
    return elapsed


def _read_all(paths: list[Path]) -> tuple[float, dict[Path, float]]:
    """Read every file once with 16 readers; the time in all, and of each read."""
    pending, times, lock = list(reversed(paths)), dict[Path, float](), threading.Lock()

    def reader() -> None:
        while True:
            with lock:
                if not pending:
                    return
                path = pending.pop()
            started = time.perf_counter()
            read_whole(path)
            times[path] = time.perf_counter() - started

    return _run_threads(reader), times


def _run_threads(call: Callable[[], None]) -> float:
    threads = [threading.Thread(target=call) for _ in range(_READERS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
