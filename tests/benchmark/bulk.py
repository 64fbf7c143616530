"""How near commands over many files come to eight calls to KMS at a time."""

import argparse
import concurrent.futures
import shutil
import subprocess
from collections import deque
from pathlib import Path

from tests.benchmark.bench import Kms, Result, running_kms, timed
from tests.support.canary import secret
from tests.support.commands import KMSFS

FILES = 5000

_LATENCY_MS = 15.0
_CALLS_AT_ONCE = 8
_BOUND = 1.3

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
    results = []
    seconds = timed(lambda: _run(kms, "encrypt", "-r", plain, "-o", volume))
    results.append(_result("encrypt -r", files, _CALLS_TO_ENCRYPT, seconds))
    seconds = timed(lambda: _run(kms, "reencrypt", volume, "--key-id", kms.key_arns[1]))
    results.append(_result("reencrypt of messages", files, _CALLS_TO_REENCRYPT, seconds))
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
