"""The daemon's end of the control socket."""

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from kmsfs.admin import control
from kmsfs.errors import DaemonBug, KmsfsError, UsageInvalid

_MAX_CONNECTIONS: Final = 16

# A peer that connects and asks nothing is cut off.
_REQUEST_S: Final = 5.0

_ACCEPT_PAUSE_S: Final = 0.1

log = logging.getLogger(__name__)

_request_decoder: Final[msgspec.json.Decoder[control.Request]] = msgspec.json.Decoder(
    control.Request
)

Responder = Callable[[control.Request, int], Awaitable[control.Answer]]


async def serve(listener: socket.socket, allowed_uids: frozenset[int], respond: Responder) -> None:
    """Answer requests until cancelled.

    Args:
        listener: a listening UNIX stream socket.
        respond: answers one request; the second argument is the asker's uid. A KmsfsError that
            it raises becomes the answer.
    """
    connections = trio.Semaphore(_MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        while True:
            await connections.acquire()
            try:
                stream = await accepting.accept()
            except OSError as error:
                # Out of descriptors, most likely; others may be given back.
                log.warning("cannot accept on the control socket: %s", error.strerror)
                connections.release()
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            nursery.start_soon(_serve_one, stream, connections, allowed_uids, respond)


async def _serve_one(
    stream: trio.SocketStream,
    connections: trio.Semaphore,
    allowed_uids: frozenset[int],
    respond: Responder,
) -> None:
    try:
        ucred = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, control.UCRED_BYTES)
        _pid, uid = control.parse_credentials(ucred)
        if uid not in allowed_uids:
            return
        line = None
        with trio.move_on_after(_REQUEST_S):
            line = await _receive_line(stream)
        if line is None:
            return
        with trio.move_on_after(control.ANSWER_S):
            answer = await _answer(line, uid, respond)
            await stream.send_all(_encoded(answer))
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        return
    finally:
        connections.release()
        await trio.aclose_forcefully(stream)


def _encoded(answer: control.Answer) -> bytes:
    try:
        return msgspec.json.encode(answer) + b"\n"
    except UnicodeEncodeError as error:
        log.error("an answer is not UTF-8")  # noqa: TRY400 - no traceback to show
        refused = control.Refused(code=DaemonBug.__name__, detail=type(error).__name__)
        return msgspec.json.encode(refused) + b"\n"


async def _receive_line(stream: trio.SocketStream) -> bytes | None:
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(control.MAX_REQUEST_BYTES)
        line += part
        if not part or len(line) > control.MAX_REQUEST_BYTES:
            return None
    return line


async def _answer(line: bytes, uid: int, respond: Responder) -> control.Answer:
    try:
        request = _request_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return control.Refused(
            code=UsageInvalid.__name__, detail=f"not a request: {type(error).__name__}"
        )
    try:
        return await respond(request, uid)
    except KmsfsError as error:
        return control.Refused(code=error.code, detail=error.detail, hint=error.hint)
    except Exception as error:  # noqa: BLE001 - one bad request must not end the mount
        # The class name only: a foreign exception's text may hold content.
        name = type(error).__name__
        log.error("answering a %s failed: %s", type(request).__name__, name)  # noqa: TRY400
        return control.Refused(code=DaemonBug.__name__, detail=name)
