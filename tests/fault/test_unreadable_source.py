"""A source that the daemon of an unprivileged user may not read all of."""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

from tests.support.forked import NOBODY
from tests.support.sites import StrictSite
from tests.support.unprivileged import session


def test_files_that_deny_an_unprivileged_daemon_are_absent_and_said(
    strict_site: StrictSite, public_directory: Path
) -> None:
    site = dataclasses.replace(strict_site, directory=public_directory)
    site.source.mkdir()
    plaintext = site.secret("good", 64)
    for name in ("good", "denied", "closed/inner"):
        site.write(f"{name}.encrypted", site.blob(plaintext))
    (site.source / "denied.encrypted").chmod(0o600)
    (site.source / "closed").chmod(0o700)
    out, mountpoint = public_directory / "out", public_directory / "mnt"
    for path in (out, mountpoint):
        path.mkdir()
        os.chown(path, NOBODY, NOBODY)
    look = (
        f"cd {mountpoint} && sha256sum <good >{out}/digest && ls >{out}/names"
        f"; cat denied 2>{out}/denied; cat closed/inner 2>{out}/inner; ls closed 2>{out}/closed"
        f"; {sys.executable} -m kmsfs status --json {mountpoint} >{out}/status"
    )
    kmsfs = [sys.executable, "-m", "kmsfs"]
    keys = ["--key-id", site.key_arn]
    mount = [*kmsfs, "mount", str(site.source), str(mountpoint), "--view", "fuse", *keys]
    commands = [mount, ["sh", "-c", look], [*kmsfs, "umount", str(mountpoint)]]
    with session(commands, env={**site.env, "LC_ALL": "C"}):
        pass
    assert (out / "digest").read_text().split()[0] == hashlib.sha256(plaintext).hexdigest()
    assert (out / "names").read_text().split() == ["closed", "good"]
    assert (out / "denied").read_text().endswith("No such file or directory\n")
    assert (out / "closed").read_text().endswith("Input/output error\n")
    assert (out / "inner").read_text().endswith("No such file or directory\n")
    told = {
        item["path"]: item["reason"] for item in json.loads((out / "status").read_text())["ignored"]
    }
    assert told["denied.encrypted"] == "cannot be opened: Permission denied"
    assert told["closed"].endswith("Permission denied")
