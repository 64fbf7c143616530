"""A credential_process that counts its runs, and gives what a test says by then."""

import json
import shlex
import sys
from pathlib import Path

from tests.support.strict_kms import Identity

PROFILE = "web"

_PROGRAM = """
import datetime, json, sys, time
directory = sys.argv[1]
with open(directory + "/runs", "a") as file:
    file.write("run\\n")
with open(directory + "/gives") as file:
    gives = json.load(file)
time.sleep(gives["takes_s"])
if gives["keys"] is None:
    sys.exit("no luck")
answer = {"Version": 1, "AccessKeyId": gives["keys"][0], "SecretAccessKey": gives["keys"][1]}
if gives["seconds"] is not None:
    end = datetime.datetime.now(datetime.timezone.utc)
    end += datetime.timedelta(seconds=gives["seconds"])
    answer["Expiration"] = end.isoformat()
print(json.dumps(answer))
"""


class CredentialSource:
    """The program, in a directory of its own; at first it gives an identity for an hour."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._directory = directory
        directory.mkdir()
        (directory / "program.py").write_text(_PROGRAM)
        self.give(identity)

    @property
    def profile(self) -> str:
        """A configuration file with the profile PROFILE, whose credentials the program gives."""
        program = (sys.executable, "-I", "-S", self._directory / "program.py", self._directory)
        argv = shlex.join(str(word) for word in program)
        return f"[profile {PROFILE}]\ncredential_process = {argv}\n"

    def give(
        self, identity: Identity | None, *, seconds: float | None = 3600.0, takes_s: float = 0.0
    ) -> None:
        """Give these credentials from now on.

        Args:
            identity: None to fail.
            seconds: how long they are good; None does not say.
            takes_s: how long each run takes.
        """
        keys = None
        if identity is not None:
            keys = [identity.access_key_id, identity.secret_access_key]
        gives = {"keys": keys, "seconds": seconds, "takes_s": takes_s}
        (self._directory / "gives").write_text(json.dumps(gives))

    @property
    def runs(self) -> int:
        """How often it was run."""
        path = self._directory / "runs"
        return len(path.read_text().splitlines()) if path.exists() else 0
