"""What a machine must have for some tests."""

import functools
import os
import shutil

import pytest


@functools.cache
def missing_for_mounts() -> str | None:
    """Why this machine cannot mount FUSE filesystems; None if it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "neither root nor fusermount3"
    return None


def require_mount(*, root: bool = True) -> None:
    """Skip the running test where it cannot mount; fail it where KMSFS_REQUIRE_MOUNT=1.

    Args:
        root: the test needs root as well.
    """
    missing = missing_for_mounts()
    if missing is None and root and os.geteuid() != 0:
        missing = "not root"
    if missing is None:
        return
    if os.environ.get("KMSFS_REQUIRE_MOUNT") == "1":
        pytest.fail(f"mounts are required here, but {missing}", pytrace=False)
    pytest.skip(f"NO MOUNT TESTS ON THIS MACHINE: {missing}")
