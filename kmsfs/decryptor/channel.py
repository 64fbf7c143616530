"""The frames of `wire` on trio sockets; apart, since launcher, zygote and workers have no trio."""

import socket
from collections.abc import Sequence

import trio

from kmsfs.decryptor import wire


async def send(
    sock: trio.socket.SocketType, message: wire.Message, fds: Sequence[int] = ()
) -> None:
    """Send one frame.

    Raises:
        WireError: too large, the peer is gone, or another task closed the socket.
    Cancellation: all of it is sent, or nothing.
    """
    try:
        await sock.sendmsg([wire.encode(message)], wire.fds_ancillary(fds), socket.MSG_NOSIGNAL)
    except trio.ClosedResourceError:
        raise wire.WireError("the socket was closed") from None
    except OSError as error:
        raise wire.WireError(f"cannot send: {error.strerror}") from error


async def receive(sock: trio.socket.SocketType) -> tuple[wire.Message, int | None]:
    """Receive one frame; see `wire.decode`.

    Raises:
        WireError: also where another task closed the socket.
    Cancellation: nothing is lost.
    """
    arguments = (wire.MAX_FRAME_BYTES + 1, wire.ANCILLARY_BYTES, wire.RECEIVE_FLAGS)
    try:
        try:
            frame, ancillary, flags, _ = await sock.recvmsg(*arguments)
        except ConnectionResetError:
            # See `wire.receive`.
            frame, ancillary, flags, _ = await sock.recvmsg(*arguments)
    except trio.ClosedResourceError:
        raise wire.WireError("the socket was closed") from None
    except OSError as error:
        raise wire.WireError(f"cannot receive: {error.strerror}") from error
    return wire.decode(frame, ancillary, flags)
