"""Any frame, any descriptors: a message or a WireError, and every descriptor accounted for."""

import os
import socket

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from kmsfs.decryptor import wire
from tests.support.process_facts import open_fds

_NAMES = st.sampled_from(
    ["Taken", "Decrypt", "Decrypted", "Failed", "SpawnWorker", "WorkerSpawned", "NewZygote"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = st.sampled_from(
    ["id", "rules", "version", "deadline_s", "size_bytes", "key_arn", "format", "code", "detail"]
)
_NEAR_MESSAGES = st.builds(
    lambda name, rest: b"\x01" + msgspec.msgpack.encode({"type": name, **rest}),
    _NAMES,
    st.dictionaries(_FIELDS | st.text(), _VALUES, max_size=6),
)
_FRAMES = st.binary(max_size=300) | st.binary(max_size=300).map(b"\x01".__add__) | _NEAR_MESSAGES


@given(frame=_FRAMES, fds=st.integers(0, 5))
@example(frame=b"", fds=1)
@example(frame=b"\x01\x81\xa1a" + b"\x91" * 60_000, fds=1)
def test_a_frame_is_a_message_or_a_wire_error_and_no_descriptor_leaks(
    frame: bytes, fds: int
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open(os.devnull, os.O_RDONLY)
    before = open_fds()
    try:
        ours.sendmsg([frame], wire.fds_ancillary([null] * fds))
        try:
            message, fd = wire.receive(theirs)
        except wire.WireError:
            pass
        else:
            assert isinstance(message, wire.Message)
            assert fds == (fd is not None)
            if fd is not None:
                os.close(fd)
        assert open_fds() == before
    finally:
        os.close(null)
        ours.close()
        theirs.close()


@given(
    st.builds(
        wire.Failed,
        id=st.integers(0, 2**63 - 1),
        code=st.text(max_size=50),
        detail=st.text(max_size=2000),
        hint=st.none() | st.text(max_size=200),
    )
)
def test_every_message_in_utf_8_comes_back_equal(message: wire.Failed) -> None:
    try:
        frame = wire.encode(message)
    except wire.WireError:
        text = message.code + message.detail + (message.hint or "")
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    assert wire.decode(frame, [], 0) == (message, None)
