"""How near commands over many files come to eight calls to KMS at a time."""

import argparse
import concurrent.futures
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from pathlib import Path

from kmsfs.formats.esdk_header import parse_header
from tests.benchmark.bench import Kms, Result, running_kms, timed
from tests.support.canary import secret
from tests.support.commands import KMSFS

FILES = 5000

_LATENCY_MS = 15.0
_CALLS_AT_ONCE = 8
_BOUND = 1.3
_BARE_CALLS = 1600

# GenerateDataKey; Decrypt, GenerateDataKey, and Decrypt to verify; ReEncrypt twice.
_CALLS_TO_ENCRYPT, _CALLS_TO_REENCRYPT, _CALLS_FOR_A_BLOB = 1, 3, 2


def measure(directory: Path, files: int = FILES) -> list[Result]:
    """encrypt -r of plain files, and reencrypt of messages and of bare blobs to a second key."""
    with running_kms("--latency-ms", str(_LATENCY_MS), "--keys", "2") as kms:
        return _measure(kms, directory, files)


def _measure(kms: Kms, directory: Path, files: int) -> list[Result]:
    plain, volume = directory / "plain", directory / "volume"
    volume.mkdir(parents=True)
    keys = ", ".join(f'"{arn}"' for arn in kms.key_arns)
    (volume / "kmsfs.toml").write_text(f'[volume]\nname = "web"\n[kms]\nkey_ids = [{keys}]\n')
    for number in range(files):
        path = plain / f"{number // 100:02}" / f"{number:05}.pem"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(secret(f"file {number}", 1700))
    results = [_bare_calls(kms)]
    seconds = timed(lambda: _run(kms, "encrypt", "-r", plain, "-o", volume))
    results.append(_result("encrypt -r", files, _CALLS_TO_ENCRYPT, seconds))
    seconds = timed(lambda: _run(kms, "reencrypt", volume, "--key-id", kms.key_arns[1]))
    results.append(_result("reencrypt of messages", files, _CALLS_TO_REENCRYPT, seconds))
    results.append(_killed_and_gone_on_with(kms, plain, volume, files))
    shutil.rmtree(plain)
    blobs = directory / "blobs"
    blobs.mkdir()
    (blobs / "kmsfs.toml").write_bytes((volume / "kmsfs.toml").read_bytes())
    client = kms.client()
    with concurrent.futures.ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:

        def make(number: int) -> None:
            made = client.encrypt(KeyId=kms.key_arns[0], Plaintext=secret(f"blob {number}", 1700))
            (blobs / f"{number:05}.kms").write_bytes(made["CiphertextBlob"])

        deque(pool.map(make, range(files)), maxlen=0)
    seconds = timed(lambda: _run(kms, "reencrypt", blobs, "--key-id", kms.key_arns[1]))
    results.append(_result("reencrypt of bare blobs", files, _CALLS_FOR_A_BLOB, seconds))
    return results


def _bare_calls(kms: Kms) -> Result:
    """What eight processes reach here that do nothing but call KMS."""

    def call() -> None:
        pids = []
        for _ in range(_CALLS_AT_ONCE):
            if (pid := os.fork()) == 0:
                client = kms.client()
                for _ in range(_BARE_CALLS // _CALLS_AT_ONCE):
                    client.generate_data_key(KeyId=kms.key_arns[0], NumberOfBytes=32)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)

    return _result("for comparison, a bare call for each", _BARE_CALLS, 1, timed(call))


def _killed_and_gone_on_with(kms: Kms, plain: Path, volume: Path, files: int) -> Result:
    """Back to the first key, by two runs of which the first is killed; all files verified."""
    arguments = ("reencrypt", volume, "--key-id", kms.key_arns[0])
    began_at = time.time()
    paths = list(volume.rglob("*.encrypted"))
    first = subprocess.Popen([*KMSFS, *arguments], env=dict(kms.env), stdout=subprocess.DEVNULL)
    while first.poll() is None:
        done = sum(path.stat().st_mtime >= began_at for path in paths)
        if done > files // 2:
            first.kill()
        time.sleep(0.1)
    first.wait()
    assert first.returncode == -signal.SIGKILL
    done = sum(path.stat().st_mtime >= began_at for path in paths)
    _run(kms, *arguments)
    seconds = time.time() - began_at
    keys = {parse_header(path.read_bytes()).key_arns for path in paths}
    assert keys == {(kms.key_arns[0],)}
    out = plain.with_name("verified")
    _run(kms, "decrypt", "-r", volume, "-o", out, "--force")
    found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.pem")}
    assert found == {path.relative_to(plain): path.read_bytes() for path in plain.rglob("*.pem")}
    shutil.rmtree(out)
    what = f"reencrypt killed after {done} files and gone on with, all {len(found)} verified,"
    return _result(what, files, _CALLS_TO_REENCRYPT, seconds)


def _run(kms: Kms, *arguments: str | Path) -> None:
    subprocess.run([*KMSFS, *arguments], env=dict(kms.env), check=True, stdout=subprocess.DEVNULL)


def _result(what: str, files: int, calls: int, seconds: float) -> Result:
    ideal_s = files * calls * _LATENCY_MS / 1000 / _CALLS_AT_ONCE
    return Result(
        f"{what} of {files} files, ratio to {_CALLS_AT_ONCE} calls of {_LATENCY_MS:g} ms at once",
        seconds / ideal_s,
        _BOUND,
        "",
        f"{seconds:.2f} s, ideal {ideal_s:.2f} s for {calls} calls a file",
    )


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(prog="bulk")
    parser.add_argument("--files", type=int, default=FILES)
    with tempfile.TemporaryDirectory(prefix="kmsfs-benchmark-") as made:
        for result in measure(Path(made) / "bulk", parser.parse_args().files):
            print(result, flush=True)
