"""The control socket's file, whose name is the mount's device number."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from kmsfs.admin import control
from tests.support.mounts import MountedVolume, wait_gone
from tests.support.sites import Site


def socket_path(volume: MountedVolume) -> str:
    assert volume.mount is not None
    return control.socket_path(volume.mount.device, os.geteuid())


@contextmanager
def taken_over(path: str) -> Iterator[None]:
    """The path as the next mount takes it: the kernel gives device numbers out again at once."""
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        try:
            yield
        finally:
            os.unlink(path)


def test_unmounting_removes_the_socket(site: Site) -> None:
    volume = site.mount()
    path = socket_path(volume)

    volume.umount()

    assert not os.path.exists(path)


def test_unmounting_leaves_the_socket_of_the_next_mount_with_the_same_number(site: Site) -> None:
    volume = site.mount()
    launcher_pid = volume.launcher_pid
    path = socket_path(volume)

    with taken_over(path):
        subprocess.run(["umount", volume.path], check=True)
        wait_gone(launcher_pid)

        assert os.path.exists(path)
