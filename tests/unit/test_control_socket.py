"""The control socket's place: who may take its name away."""

import os
from pathlib import Path

import pytest

from kmsfs.admin import control
from kmsfs.launcher.control_socket import ControlSocket


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control, "socket_directory", lambda uid: str(tmp_path / "kmsfs" / "ctl"))
    return tmp_path / "kmsfs" / "ctl"


def test_removing_takes_its_own_name_away(directory: Path) -> None:
    place = ControlSocket("0:77")
    with place.listen():
        assert os.listdir(directory) == ["0-77.sock"]
    place.remove()
    place.remove()
    assert os.listdir(directory) == []


def test_the_socket_of_a_later_mount_with_the_same_device_number_stays(directory: Path) -> None:
    # Whether its inode number is the same too, is the filesystem's choice.
    for _ in range(5):
        earlier, later = ControlSocket("0:77"), ControlSocket("0:77")
        with earlier.listen():
            pass
        with later.listen():
            earlier.remove()
            assert os.listdir(directory) == ["0-77.sock"]
        later.remove()
