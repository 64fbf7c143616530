"""AWS configuration files and environments of a test process."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.strict_kms import Identity


@dataclass(frozen=True)
class AwsFiles:
    """This process's `~/.aws`, below a test's directory; empty at first."""

    directory: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def config(self) -> Path:
        """The file that AWS_CONFIG_FILE names."""
        return self.directory / "no-aws-config"

    @property
    def credentials(self) -> Path:
        """The file that AWS_SHARED_CREDENTIALS_FILE names."""
        return self.directory / "no-aws-credentials"

    def write_credentials(self, profile: str, identity: Identity) -> None:
        """Replace the shared credentials file by one profile."""
        text = (
            f"[{profile}]\naws_access_key_id = {identity.access_key_id}\n"
            f"aws_secret_access_key = {identity.secret_access_key}\n"
        )
        if identity.session_token is not None:
            text += f"aws_session_token = {identity.session_token}\n"
        self.credentials.write_text(text)

    def write_profile(self, profile: str, **options: str) -> None:
        """Replace the configuration file by one profile."""
        name = profile if profile == "default" else f"profile {profile}"
        lines = "".join(f"{key} = {value}\n" for key, value in options.items())
        self.config.write_text(f"[{name}]\n{lines}")

    def write_process(self, profile: str, *argv: str) -> None:
        """A profile whose credentials a program prints."""
        self.write_profile(profile, credential_process=shlex.join(argv))

    def program(self, text: str) -> tuple[str, ...]:
        """A program in Python, to be given to `write_process`."""
        return sys.executable, "-I", "-S", "-c", text

    def set_environment(self, env: Mapping[str, str], *, without: tuple[str, ...] = ()) -> None:
        """Take the AWS variables of an environment for this process."""
        for name, value in env.items():
            if name.startswith("AWS_") and name not in without:
                self.monkeypatch.setenv(name, value)

    def clear_environment(self) -> None:
        """Take away what `set_environment` set, the files' names excepted."""
        for name in list(os.environ):
            if name.startswith("AWS_") and not name.endswith("_FILE"):
                self.monkeypatch.delenv(name)
