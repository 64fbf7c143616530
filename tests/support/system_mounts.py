"""Mounts with what only the system configuration may set; that of this machine stays as it is."""

import json
import subprocess
import sys
from typing import Any

import msgspec

from kmsfs.settings import MountConfig
from tests.support.canary import carries
from tests.support.mounts import MountedVolume
from tests.support.sites import Site

# As `kmsfs mount` does.
_MOUNT = """
import json, sys
import msgspec
from kmsfs.launcher import launch
from kmsfs.manage.mounting import MountOptions, mount_config
from kmsfs.settings import MountConfig

source, mountpoint, view, changes = sys.argv[1:]
def make_config():
    config = mount_config(source, mountpoint, MountOptions(view=view))
    merged = {**msgspec.to_builtins(config), **json.loads(changes)}
    return msgspec.convert(merged, MountConfig)
def tell(message):
    print(message, file=sys.stderr)
try:
    sys.exit(launch(make_config, foreground=False, tell=tell))
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(getattr(error, "exit_code", 70))
"""


def mount_with(
    site: Site, view: str, *, env: dict[str, str] | None = None, exit_code: int = 0, **changes: Any
) -> tuple[MountedVolume, str]:
    """Mount a site with fields of `MountConfig` that no option sets.

    Returns: the mount, and what was said on standard error.
    """
    unknown = changes.keys() - set(MountConfig.__struct_fields__)
    assert not unknown, unknown
    volume = MountedVolume(site.source, site.directory / "mnt", env or site.env)
    volume.path.mkdir(exist_ok=True)
    site.mounter.mounted.append(volume)
    done = subprocess.run(
        [sys.executable, "-c", _MOUNT, site.source, volume.path, view]
        + [json.dumps(msgspec.to_builtins(changes))],
        env=dict(volume.env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert not carries(done.stdout + done.stderr)
    said = done.stderr.decode()
    assert done.returncode == exit_code, said
    return volume, said
