"""What the benchmarks share: a KMS in a process of its own, volumes, results."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config

from tests.support.mounts import MountedVolume, Mounter
from tests.support.sites import Site


@dataclass(frozen=True)
class Result:
    """One line: what was measured, the value, and the bound it is held against."""

    what: str
    value: float
    bound: float
    unit: str
    detail: str

    def __str__(self) -> str:
        verdict = "within" if self.value <= self.bound else "ABOVE"
        return (
            f"{self.what}: {self.value:.2f}{self.unit} ({verdict} {self.bound:g}{self.unit}; "
            f"{self.detail})"
        )


@dataclass(frozen=True)
class Kms:
    """A running stand-in for KMS."""

    endpoint_url: str
    key_arns: list[str]
    env: Mapping[str, str]

    def client(self) -> Any:
        """Bare botocore, as a program without kmsfs would have it."""
        return botocore.session.Session().create_client(
            "kms",
            region_name=self.env["AWS_DEFAULT_REGION"],
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(connect_timeout=1, read_timeout=5, tcp_keepalive=True),
        )


@contextlib.contextmanager
def running_kms(*arguments: str) -> Iterator[Kms]:
    """The strict stand-in as a process of its own, so that it shares no interpreter with us."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.strict_kms", "--no-signatures", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield Kms(said["endpoint_url"], said["key_arns"], said["env"])
    finally:
        process.communicate(timeout=20)


@contextlib.contextmanager
def site_of(kms: Kms, directory: Path) -> Iterator[Site]:
    """A source and mounts in a new directory; unmounted in the end."""
    directory.mkdir(parents=True)
    mounter = Mounter(kms.env)
    site = Site(directory, kms.env, kms.key_arns[0], kms.client(), mounter)
    site.source.mkdir()
    try:
        yield site
    finally:
        mounter.clean_up()


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read_whole(path: Path) -> bytes:
    """open, read and close, as a small program does."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def median_ms(samples: list[float]) -> float:
    """Median of seconds, in milliseconds."""
    return statistics.median(samples) * 1000


def wait_without_workers(volume: MountedVolume) -> None:
    """Wait until the mount has ended its idle workers."""
    while volume.status()["worker_pids"]:
        time.sleep(0.25)
