"""Frames: what is not a message in form is refused, and its descriptors are closed."""

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
import trio

from kmsfs.decryptor import channel, wire
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.formats.binding import Place
from tests.support.process_facts import open_fds

Pair = tuple[socket.socket, socket.socket]

RULES = DecryptRules(
    key_ids=("arn:aws:kms:eu-central-1:111122223333:key/a",),
    encryption_context={"service": "wéb"},
    place=Place("web", "nginx/ssl.pem"),
    binding_required=True,
)
DECRYPT = wire.Decrypt(id=7, rules=RULES, version=(1, 2, 3, 2**60, -1), deadline_s=4.5)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends of a socket of the kind that processes of a mount are joined by."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def send_raw(sock: socket.socket, frame: bytes, fds: list[int]) -> None:
    """A frame of any form."""
    sock.sendmsg([frame], wire.fds_ancillary(fds))


def test_a_message_arrives_as_it_was_sent_with_its_descriptor(pair: Pair) -> None:
    read_end, write_end = os.pipe()
    wire.send(pair[0], DECRYPT, [read_end])
    os.close(read_end)
    message, fd = wire.receive(pair[1])
    assert message == DECRYPT
    assert fd is not None
    assert not os.get_inheritable(fd)
    os.write(write_end, b"same pipe")
    assert os.read(fd, 100) == b"same pipe"
    os.close(fd)
    os.close(write_end)


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        pytest.param(wire.Taken(id=1), 1, id="one-where-none-belongs"),
        pytest.param(wire.Failed(id=1, code="FileTooLarge", detail=""), 1, id="with-an-error"),
        pytest.param(DECRYPT, 0, id="none-where-one-belongs"),
        pytest.param(DECRYPT, 2, id="two-where-one-belongs"),
        pytest.param(DECRYPT, 3, id="more-than-the-buffer-takes"),
        pytest.param(wire.WorkerSpawned(id=1, pid=1), 0, id="no-pidfd"),
    ],
)
def test_descriptors_that_do_not_belong_to_a_message_are_closed(
    pair: Pair, message: wire.Message, fds: int
) -> None:
    with open(os.devnull) as null:
        before = open_fds()
        send_raw(pair[0], wire.encode(message), [null.fileno()] * fds)
        with pytest.raises(wire.WireError):
            wire.receive(pair[1])
        assert open_fds() == before


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"\x02" + wire.encode(DECRYPT)[1:], id="another-version"),
        pytest.param(b"\x01", id="nothing-but-a-version"),
        pytest.param(wire.encode(DECRYPT)[:-1], id="cut-short"),
        pytest.param(wire.encode(DECRYPT) + b"\xc0", id="trailing"),
        pytest.param(b"\x01\x81\xa1a" + b"\x91" * 60_000, id="nested-too-deeply"),
        pytest.param(b"\x01\x81\xa4type\xa2\xff\xfe", id="not-utf-8"),
        pytest.param(b"\x01" + msgspec.msgpack.encode({"type": "Unheard"}), id="unheard-of"),
        pytest.param(
            b"\x01" + msgspec.msgpack.encode({"type": "Taken", "id": 1, "more": 2}),
            id="unknown-field",
        ),
        pytest.param(
            b"\x01" + msgspec.msgpack.encode({"type": "Taken", "id": "1"}), id="wrong-type"
        ),
        pytest.param(b"\x01" + bytes(wire.MAX_FRAME_BYTES + 1000), id="too-long"),
    ],
)
def test_what_is_no_message_is_refused_and_its_descriptor_closed(pair: Pair, frame: bytes) -> None:
    with open(os.devnull) as null:
        before = open_fds()
        send_raw(pair[0], frame, [null.fileno()])
        with pytest.raises(wire.WireError):
            wire.receive(pair[1])
        assert open_fds() == before


def test_the_error_of_a_frame_quotes_nothing_of_it(pair: Pair) -> None:
    send_raw(pair[0], b"\x01" + msgspec.msgpack.encode({"type": "very-secret"}), [])
    with pytest.raises(wire.WireError) as caught:
        wire.receive(pair[1])
    assert "very-secret" not in str(caught.value)


def test_the_end_of_the_peer_is_an_error_of_its_own(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(wire.WireError, match="closed its end"):
        wire.receive(pair[1])
    with pytest.raises(wire.WireError, match="Broken pipe"):
        wire.send(pair[1], wire.Taken(id=1))


def test_waiting_too_long_says_so(pair: Pair) -> None:
    pair[1].settimeout(0.01)
    with pytest.raises(wire.WireError, match="timed out"):
        wire.receive(pair[1])


def test_a_frame_that_is_too_large_is_not_sent(pair: Pair) -> None:
    with pytest.raises(wire.WireError, match="too large"):
        wire.send(pair[0], wire.Failed(id=1, code="x", detail="d" * wire.MAX_FRAME_BYTES))


def test_text_that_is_not_utf_8_is_not_sent(pair: Pair) -> None:
    with pytest.raises(wire.WireError, match="UTF-8"):
        wire.send(pair[0], wire.Failed(id=1, code="x", detail="\udcff"))


def test_expect_closes_the_descriptor_of_another_message() -> None:
    before = open_fds()
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(wire.WireError, match="Decrypt where SpawnWorker was due"):
        wire.expect((DECRYPT, fd), wire.SpawnWorker)
    assert open_fds() == before


@pytest.mark.trio
async def test_a_channel_speaks_the_same_frames(pair: Pair) -> None:
    ours, theirs = (trio.socket.from_stdlib_socket(sock) for sock in pair)
    await channel.send(ours, wire.SpawnWorker(id=3), [0])
    message, fd = await channel.receive(theirs)
    assert message == wire.SpawnWorker(id=3)
    assert fd is not None
    os.close(fd)


@pytest.mark.trio
async def test_closing_a_channel_in_use_is_a_wire_error_for_its_user(
    pair: Pair, nursery: trio.Nursery
) -> None:
    ours = trio.socket.from_stdlib_socket(pair[0])
    errors: list[str] = []

    async def receive(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with pytest.raises(wire.WireError) as caught:
            await channel.receive(ours)
        errors.append(str(caught.value))

    await nursery.start(receive)
    await trio.testing.wait_all_tasks_blocked()
    ours.close()
    await trio.testing.wait_all_tasks_blocked()
    assert errors == ["the socket was closed"]


@pytest.mark.trio
async def test_a_cancelled_receive_loses_no_frame(pair: Pair) -> None:
    ours = trio.socket.from_stdlib_socket(pair[0])
    with trio.move_on_after(0):
        await channel.receive(ours)
    wire.send(pair[1], wire.Taken(id=5))
    assert await channel.receive(ours) == (wire.Taken(id=5), None)


@pytest.mark.trio
async def test_the_last_words_of_a_peer_that_did_not_hear_everything_arrive() -> None:
    for receive in (_receive_blocking, _receive_on_trio):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                wire.send(ours, wire.ZygoteWanted())
                wire.send(theirs, wire.DaemonFailed(code="KmsThrottled", detail="x", hint="y"))
            assert await receive(ours) == (
                wire.DaemonFailed(code="KmsThrottled", detail="x", hint="y"),
                None,
            )
            with pytest.raises(wire.WireError):
                await receive(ours)


async def _receive_blocking(sock: socket.socket) -> object:
    return wire.receive(sock)


async def _receive_on_trio(sock: socket.socket) -> object:
    return await channel.receive(trio.socket.from_stdlib_socket(sock))
