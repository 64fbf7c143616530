"""Processes that leave plaintext where kmsfs must not: the controls of tests that look for it.

Run as `python -m tests.support.control_process WHAT [ARGUMENT...]`; it says "ready" and lives
until its standard input ends. `keep` holds what standard input gives, up to its first newline,
in hex; `map PATH` maps a file and touches every page of it; `decrypt KEY_ARN BLOB` has KMS
decrypt a blob in base64 with botocore, and drops every reference to the plaintext.
"""

import base64
import contextlib
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def control_process(
    what: str, *arguments: str, env: Mapping[str, str] | None = None, given: bytes = b""
) -> Iterator[int]:
    """Such a process, ready; its pid.

    Args:
        env: the whole environment; this process's own by default.
        given: bytes for `keep`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.control_process", what, *arguments],
        env=None if env is None else dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(given.hex().encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        # Whoever looked at one that had ended found nothing for that reason.
        assert process.poll() != 0
    finally:
        process.communicate(timeout=20)


def _wait(kept: object) -> None:
    print("ready", flush=True)
    # Nothing in memory moves any more, as it would with sys.stdin.
    while os.read(0, 100):
        pass
    del kept


def _keep() -> None:
    kept = bytes.fromhex(sys.stdin.readline())
    _wait(kept)


def _map(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    size_bytes = os.fstat(fd).st_size
    with mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ) as mapped:
        touched = sum(mapped[at] for at in range(0, size_bytes, mmap.PAGESIZE))
        _wait(touched)


def _decrypt(key_arn: str, blob: str) -> None:
    import botocore.session

    client = botocore.session.Session().create_client("kms")
    answer = client.decrypt(KeyId=key_arn, CiphertextBlob=base64.b64decode(blob))
    assert answer.pop("Plaintext")
    del answer
    gc.collect()
    _wait(client)


if __name__ == "__main__":
    {"keep": _keep, "map": _map, "decrypt": _decrypt}[sys.argv[1]](*sys.argv[2:])
