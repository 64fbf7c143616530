"""moto's server as a process of its own: inside the test process it patches botocore."""

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Self

import botocore.session

from tests.support import leftovers

REGION = "us-east-1"

_MAIN = "from moto.server import main; main()"

_RUNNING = re.compile(r"Running on (http://127\.0\.0\.1:[0-9]+)")


class MotoKms:
    """An embedded KMS for good paths. It is not strict: see `strict_kms` for refusals."""

    def __init__(self) -> None:
        self.endpoint_url = ""
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "-H", "127.0.0.1", "-p", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        leftovers.keep(self._process.pid)
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if found := _RUNNING.search(line):
                self.endpoint_url = found[1]
                break
        assert self.endpoint_url, "moto has not started: " + "".join(said)
        self._reader = threading.Thread(target=_drain, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._reader is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def env(self, **more: str) -> dict[str, str]:
        """Environment for a child process."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "LC_ALL": "C.UTF-8",
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            **more,
        }

    def client(self) -> Any:
        """A client of botocore."""
        return botocore.session.Session().create_client(
            "kms",
            region_name=REGION,
            endpoint_url=self.endpoint_url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def create_key(self) -> str:
        """ARN of a new key."""
        return str(self.client().create_key()["KeyMetadata"]["Arn"])


def _drain(lines: Iterable[str]) -> None:
    """Read what the server goes on saying, so that it never waits for us."""
    deque(lines, maxlen=0)
