"""Commands as real processes, against moto's KMS on loopback."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.moto_kms import MotoKms


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


@pytest.fixture
def kmsfs(moto_kms: MotoKms, bare_kmsfs: Commands) -> Commands:
    """kmsfs with credentials, and moto for KMS."""
    bare_kmsfs.env |= moto_kms.env(HOME=str(bare_kmsfs.directory))
    return bare_kmsfs


class KeyMaker:
    """`new_key()` makes a key in moto and gives its ARN."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __call__(self, alias: str | None = None) -> str:
        metadata = self.client.create_key()["KeyMetadata"]
        if alias is not None:
            self.client.create_alias(AliasName=alias, TargetKeyId=metadata["KeyId"])
        return str(metadata["Arn"])


@pytest.fixture
def new_key(moto_kms: MotoKms) -> Iterator[KeyMaker]:
    """Makes keys."""
    client = moto_kms.client()
    yield KeyMaker(client)
    client.close()


@pytest.fixture
def alias() -> str:
    """A name that no other test has given a key of the same moto."""
    return f"alias/{uuid.uuid4()}"


@pytest.fixture
def key(new_key: KeyMaker) -> str:
    """ARN of a new key."""
    return new_key()


@pytest.fixture
def volume(kmsfs: Commands, key: str) -> Path:
    """A volume named `web` under `key`; commands run in it."""
    return make_volume(kmsfs, key)


def make_volume(kmsfs: Commands, key: str) -> Path:
    """The same under any key service."""
    root = kmsfs.directory / "web"
    root.mkdir()
    (root / "kmsfs.toml").write_text(
        f'[volume]\nname = "web"\nunbound = []\n\n[kms]\nkey_ids = ["{key}"]\n'
    )
    kmsfs.directory = root
    return root
