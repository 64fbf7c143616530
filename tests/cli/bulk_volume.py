"""Volumes with many files under the strict stand-in for KMS: what tests of bulk commands share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmsfs.formats.esdk_header import parse_header
from tests.cli.conftest import Commands, Done
from tests.support import canary
from tests.support.mounts import wait_until
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms


def context_of(path: Path) -> dict[str, str]:
    """The encryption context of a message, without the pair that the SDK adds."""
    pairs = dict(parse_header(path.read_bytes()).encryption_context)
    pairs.pop("aws-crypto-public-key", None)
    return pairs


def key_of(path: Path) -> str:
    """The key that a message is encrypted under."""
    (arn,) = parse_header(path.read_bytes()).key_arns
    return arn


def names_below(directory: Path) -> set[str]:
    """Paths of all that is no directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


@dataclass
class BulkVolume:
    """A volume named `web`, its KMS, and commands that run beside it.

    Attributes:
        key: the volume's first key.
        other: a second one, which the volume allows too.
    """

    kms: StrictKms
    kmsfs: Commands
    root: Path
    key: KmsKey
    other: KmsKey

    @classmethod
    def make(cls, kms: StrictKms, kmsfs: Commands) -> "BulkVolume":
        """A new one."""
        kmsfs.env |= kms.env(HOME=str(kmsfs.directory))
        made = cls(kms, kmsfs, kmsfs.directory / "web", kms.create_key(), kms.create_key())
        made.root.mkdir()
        made.configure()
        return made

    def configure(self, *unbound: str, more: str = "") -> None:
        """Write its kmsfs.toml."""
        patterns = ", ".join(f'"{pattern}"' for pattern in unbound)
        (self.root / "kmsfs.toml").write_text(
            f'[volume]\nname = "web"\nunbound = [{patterns}]\n\n'
            f'[kms]\nkey_ids = ["{self.key.arn}", "{self.other.arn}"]\n{more}'
        )

    @property
    def plain(self) -> Path:
        """A directory beside the volume for plaintext."""
        return self.root.parent / "plain"

    def write_plain(self, *names: str) -> None:
        """Put plaintexts into `plain`."""
        for name in names:
            path = self.plain / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content(name))

    def content(self, name: str) -> bytes:
        """The plaintext of a file."""
        return canary.secret(name, 300)

    def encrypt(self, *names: str) -> None:
        """Bound files in the volume, by one command."""
        self.write_plain(*names)
        self.kmsfs.good("encrypt", "-r", self.plain, "-o", self.root)
        self.kms.forget_calls()

    def blob(self, name: str, key: KmsKey | None = None, **context: str) -> Path:
        """A bare blob of `content(name)` in the volume's NAME.kms."""
        path = self.root / f"{name}.kms"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((key or self.key).seal(self.content(name), context))
        return path

    def path(self, name: str) -> Path:
        """Where `encrypt` puts a name."""
        return self.root / f"{name}.encrypted"

    def check(self, *names: str) -> None:
        """All of these decrypt to what they should, where they lie."""
        out = self.root.parent / "checked"
        self.kmsfs.good("decrypt", "-r", self.root, "-o", out, "--force")
        assert {name: (out / name).read_bytes() for name in names} == {
            name: self.content(name) for name in names
        }

    def decrypt(self, path: Path) -> bytes:
        """The plaintext of one file."""
        return self.kmsfs.good("decrypt", path).stdout

    def operations(self) -> list[str]:
        """What KMS was asked since `encrypt`, sorted."""
        return sorted(call.operation for call in self.kms.calls())

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """A command that is not waited for, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "kmsfs", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.kmsfs.directory,
            env=self.kmsfs.env,
            start_new_session=True,
        )

    def interrupted(
        self, number: signal.Signals, when: Callable[[], bool], *arguments: str | Path
    ) -> Done:
        """A command to which a signal is sent once `when` holds."""
        process = self.start(*arguments)
        wait_until(lambda: when() or process.poll() is not None, "it is in the midst", 60.0)
        os.kill(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
        return Done(process.returncode, stdout, stderr.decode())
