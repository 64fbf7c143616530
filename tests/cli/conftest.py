"""Commands as real processes, against moto's KMS on loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

REGION = "eu-central-1"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Lines on standard error."""
        return self.stderr.splitlines()


@dataclass
class Commands:
    """Runs `kmsfs` in a directory and an environment of its own."""

    directory: Path
    env: dict[str, str] = field(default_factory=dict)

    def __call__(
        self, *arguments: str | Path, stdin: bytes | None = None, cwd: Path | None = None
    ) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "kmsfs", *map(str, arguments)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            cwd=cwd or self.directory,
            env=self.env,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode())

    def good(self, *arguments: str | Path, stdin: bytes | None = None) -> Done:
        """Run a command that must succeed."""
        done = self(*arguments, stdin=stdin)
        assert done.status == 0, done.stderr
        return done


def _clean_environment(home: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "KMSFS_", "_KMSFS_", "XDG_"))
    }
    return kept | {"HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def bare_kmsfs(tmp_path: Path) -> Commands:
    """kmsfs with no credentials and no KMS."""
    return Commands(tmp_path, _clean_environment(tmp_path))


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """Address of a KMS by moto."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def kmsfs(moto_url: str, bare_kmsfs: Commands) -> Commands:
    """kmsfs with credentials, and moto for KMS."""
    bare_kmsfs.env |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL_KMS": moto_url,
    }
    return bare_kmsfs


@pytest.fixture(scope="session")
def new_key(moto_url: str) -> Iterator["KeyMaker"]:
    """Makes keys in moto."""
    client = boto3.client(
        "kms",
        region_name=REGION,
        endpoint_url=moto_url,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    yield KeyMaker(client)
    client.close()


@dataclass
class KeyMaker:
    """`new_key()` makes one and gives its ARN."""

    client: object

    def __call__(self, alias: str | None = None) -> str:
        metadata = self.client.create_key()["KeyMetadata"]  # type: ignore[attr-defined]
        if alias is not None:
            self.client.create_alias(  # type: ignore[attr-defined]
                AliasName=alias, TargetKeyId=metadata["KeyId"]
            )
        return str(metadata["Arn"])


@pytest.fixture
def key(new_key: "KeyMaker") -> str:
    """ARN of a new key."""
    return new_key()


@pytest.fixture
def volume(kmsfs: Commands, key: str) -> Path:
    """A volume named `web` under `key`; commands run in it."""
    root = kmsfs.directory / "web"
    root.mkdir()
    (root / "kmsfs.toml").write_text(
        f'[volume]\nname = "web"\nunbound = []\n\n[kms]\nkey_ids = ["{key}"]\n'
    )
    kmsfs.directory = root
    return root
