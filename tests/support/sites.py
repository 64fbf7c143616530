"""A place to put ciphertext, a key to encrypt it with, and a mountpoint: what mount tests use."""

import base64
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kmsfs.formats.binding import Place
from kmsfs.keys.service import DataKey
from kmsfs.manage.encrypt import encrypt_bound
from tests.support.canary import secret
from tests.support.mounts import MountedVolume, Mounter, strerror_of_cat
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

AWS = (sys.executable, "-m", "awscli")

VOLUME = "web"


class ClientKeys:
    """The part of a KeyService that encrypting needs, over a client that the test made."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def generate_data_key(
        self, *, key_id: str, size_bytes: int, encryption_context: Mapping[str, str]
    ) -> DataKey:
        """GenerateDataKey."""
        made = self._client.generate_data_key(
            KeyId=key_id, NumberOfBytes=size_bytes, EncryptionContext=dict(encryption_context)
        )
        return DataKey(made["Plaintext"], made["CiphertextBlob"], made["KeyId"])


@dataclass
class Site:
    """A source directory, a KMS with one key, and mounts of it under `directory`.

    Attributes:
        client: of KMS, in this process; encrypting with it costs less than a command.
        versions: how often each name was encrypted, which is its version: 1 at first.
    """

    directory: Path
    env: Mapping[str, str]
    key_arn: str
    client: Any
    mounter: Mounter
    versions: dict[str, int] = field(default_factory=dict, kw_only=True)

    @property
    def source(self) -> Path:
        """The directory of ciphertext."""
        return self.directory / "source"

    def secret(self, label: str, size_bytes: int) -> bytes:
        """A plaintext that carries the canary, as far as it fits."""
        return secret(label, size_bytes)

    def write(self, name: str, content: bytes) -> Path:
        """Put bytes into the source as they are."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def make_volume(self, *unbound: str, key_ids: tuple[str, ...] = ()) -> None:
        """Write the volume's kmsfs.toml."""
        keys = ", ".join(f'"{key}"' for key in key_ids or (self.key_arn,))
        patterns = ", ".join(f'"{pattern}"' for pattern in unbound)
        lines = (
            "[volume]",
            f'name = "{VOLUME}"',
            f"unbound = [{patterns}]",
            "[kms]",
            f"key_ids = [{keys}]",
        )
        self.write("kmsfs.toml", "".join(line + "\n" for line in lines).encode())

    def append_config(self, text: str) -> None:
        """Add to the volume's kmsfs.toml."""
        with (self.source / "kmsfs.toml").open("a") as file:
            file.write(text)

    def encrypt(self, name: str, plaintext: bytes, *, key_arn: str = "") -> Path:
        """Put a message, bound to its place in the volume, into NAME.encrypted by rename."""
        ciphertext = self.seal(name, plaintext, key_arn=key_arn)
        return self.replace(f"{name}.encrypted", ciphertext)

    def seal(self, name: str, plaintext: bytes, *, key_arn: str = "") -> bytes:
        """The next version of a message that is bound to its place in the volume."""
        message = encrypt_bound(
            plaintext,
            Place(VOLUME, name),
            self._next_version(name),
            key_id=key_arn or self.key_arn,
            encryption_context={},
            keys=ClientKeys(self.client),
        )
        return message.ciphertext

    def replace(self, name: str, content: bytes) -> Path:
        """Put bytes into the source by rename."""
        output = self.source / name
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_suffix(".new")
        beside.write_bytes(content)
        beside.rename(output)
        return output

    def _next_version(self, name: str) -> int:
        self.versions[name] = self.versions.get(name, 0) + 1
        return self.versions[name]

    def blob(self, plaintext: bytes, *, key_arn: str = "", **context: str) -> bytes:
        """A bare blob, as KMS gives it."""
        made = self.client.encrypt(
            KeyId=key_arn or self.key_arn, Plaintext=plaintext, EncryptionContext=context
        )
        ciphertext: bytes = made["CiphertextBlob"]
        return ciphertext

    def encrypt_with_aws_cli(self, name: str, plaintext: bytes) -> None:
        """`aws kms encrypt --query CiphertextBlob --output text | base64 --decode > NAME`."""
        done = subprocess.run(
            [*AWS, "kms", "encrypt", "--key-id", self.key_arn, "--plaintext", "fileb:///dev/stdin"]
            + ["--query", "CiphertextBlob", "--output", "text"],
            input=plaintext,
            env=dict(self.env),
            capture_output=True,
            check=True,
            timeout=60,
        )
        self.write(name, base64.b64decode(done.stdout))

    def mount(
        self,
        *arguments: str,
        path: Path | None = None,
        key: str | None = "",
        env: Mapping[str, str] | None = None,
        exit_code: int = 0,
        prefix: Sequence[str] = (),
    ) -> MountedVolume:
        """`kmsfs mount`, with this site's key where the source has no kmsfs.toml.

        Args:
            exit_code: what the command must end with; the mount is there in any case.
            prefix: a program to run the command under, with its arguments.
        """
        if key == "":
            key = None if (self.source / "kmsfs.toml").exists() else self.key_arn
        keys = () if key is None else ("--key-id", key)
        where = path or self.directory / "mnt"
        return self.mounter.mount(
            self.source, where, *keys, *arguments, env=env, exit_code=exit_code, prefix=prefix
        )

    def error_of_cat(self, path: Path) -> str:
        """What `cat` says of a file; empty if it can read it."""
        return strerror_of_cat(path)

    def read_as(self, user: str, path: Path) -> bytes:
        """Read a file as another user.

        Raises:
            PermissionError: that user may not.
        """
        done = subprocess.run(
            ["cat", path],
            user=user,
            group=user if user != "nobody" else "nogroup",
            extra_groups=[],
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=False,
        )
        if b"Permission denied" in done.stderr:
            raise PermissionError(os.fspath(path))
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


@dataclass
class StrictSite(Site):
    """A site whose KMS is the strict stand-in."""

    kms: StrictKms
    key: KmsKey
