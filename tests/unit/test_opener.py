"""What a daemon without permission is opened: ciphertext for reading, and nothing else."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.decryptor import wire
from kmsfs.launcher.opener import SourceOpener
from kmsfs.store.opener import RemoteOpener
from tests.support.limits import no_descriptor_left
from tests.support.process_facts import open_fds


class Answering:
    """A launcher's end that answers, and the daemon's that asks."""

    def __init__(self, root: Path) -> None:
        self.opener = SourceOpener(str(root))
        self.ask = RemoteOpener(self.opener.daemon_end.dup())
        self.opener.daemon_end.close()
        self.thread = threading.Thread(target=self._answer)
        self.thread.start()

    def _answer(self) -> None:
        while self.opener.answer():
            pass

    def close(self) -> None:
        """As the daemon ends."""
        self.ask._sock.close()
        self.thread.join(10)
        self.opener.close()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    """Over a source with `dir/file`, and a link that leads out of it."""
    root = tmp_path / "source"
    (root / "dir").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"ciphertext")
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "outside").write_bytes(b"outside")
    before = open_fds()
    made = Answering(root)
    yield made
    made.close()
    assert open_fds() == before


def test_a_file_and_a_directory_are_opened_for_reading(answering: Answering) -> None:
    with open(answering.ask("dir/file", os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        assert file.read() == b"ciphertext"
    fd = answering.ask("dir", os.O_RDONLY | os.O_DIRECTORY)
    assert os.listdir(fd) == ["file"]
    os.close(fd)


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT]
)
def test_nothing_is_opened_for_writing(answering: Answering, flags: int) -> None:
    with pytest.raises(PermissionError):
        answering.ask("dir/file", flags)


@pytest.mark.parametrize("path", ["../outside", "out/outside", "/etc/passwd", "dir/../../outside"])
def test_nothing_outside_the_source_is_opened(answering: Answering, path: str) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        answering.ask(path, os.O_RDONLY)


def test_what_is_not_there_is_said(answering: Answering) -> None:
    with pytest.raises(FileNotFoundError):
        answering.ask("dir/none", os.O_RDONLY)


def test_without_a_descriptor_left_one_file_cannot_be_opened_and_the_next_can(
    tmp_path: Path,
) -> None:
    launcher, daemon = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ask = RemoteOpener(daemon)
    with launcher, daemon, (tmp_path / "file").open("wb") as file:
        wire.send(launcher, wire.SourceOpened(), [file.fileno()])
        with no_descriptor_left(), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            ask("file", os.O_RDONLY)
        wire.send(launcher, wire.SourceOpened(), [file.fileno()])
        os.close(ask("file", os.O_RDONLY))


def test_a_launcher_that_is_gone_is_an_error_from_then_on(tmp_path: Path) -> None:
    opener = SourceOpener(str(tmp_path))
    ask = RemoteOpener(opener.daemon_end.dup())
    opener.close()
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            ask("file", os.O_RDONLY)
    ask._sock.close()
