"""The control socket: who is answered, and what no peer can do to the daemon."""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kmsfs.admin import control, control_server
from kmsfs.admin.status import MountStatus
from kmsfs.errors import ControlUnavailable, DaemonBug, GuaranteeNotMet, KmsfsError, UsageInvalid
from tests.support import forked
from tests.support.mount_status import STATUS


class Daemon:
    """Answers `StatusRequest`, and other requests as told by `error`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: Exception | None = None
        self.status = STATUS
        self.asked: list[tuple[control.Request, int]] = []

    async def respond(self, request: control.Request, uid: int) -> control.Answer:
        self.asked.append((request, uid))
        if self.error is not None:
            raise self.error
        if isinstance(request, control.StatusRequest):
            return control.StatusAnswer(status=self.status)
        if isinstance(request, control.LockRequest):
            return control.Locked(wiped=3)
        return control.Unlocked()

    async def ask(self, request: control.Request) -> control.Answer:
        """What the commands do, in a thread."""
        return await trio.to_thread.run_sync(control.call, "0:77", 0, request)

    async def ask_raw(self, line: bytes) -> bytes:
        """Any bytes, and everything that comes back."""
        async with await trio.open_unix_socket(self.path) as stream:
            await stream.send_all(line)
            return b"".join([part async for part in stream])


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Daemon]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """A served control socket; the server must still be answering at the end."""
    monkeypatch.setattr(control, "socket_directory", lambda _uid: str(tmp_path))
    path = control.socket_path("0:77", 0)

    @contextlib.asynccontextmanager
    async def serving(*, allowed: int | None = None) -> AsyncIterator[Daemon]:
        daemon = Daemon(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen()
            uids = frozenset({os.geteuid() if allowed is None else allowed})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control_server.serve, listener, uids, daemon.respond)
                yield daemon
                if allowed is None:
                    daemon.error = None
                    assert isinstance(await daemon.ask(control.LockRequest()), control.Locked)
                nursery.cancel_scope.cancel()

    return serving


@pytest.mark.trio
async def test_each_request_has_its_answer_and_its_askers_uid(serve: Serve) -> None:
    async with serve() as daemon:
        answer = await daemon.ask(control.StatusRequest())
        assert answer == control.StatusAnswer(status=STATUS)
        assert await daemon.ask(control.LockRequest()) == control.Locked(wiped=3)
        assert await daemon.ask(control.UnlockRequest()) == control.Unlocked()
        uid = os.geteuid()
        assert daemon.asked == [
            (control.StatusRequest(), uid),
            (control.LockRequest(), uid),
            (control.UnlockRequest(), uid),
        ]


@pytest.mark.trio
async def test_others_are_not_answered(serve: Serve) -> None:
    async with serve(allowed=forked.NOBODY) as daemon:
        with pytest.raises(ControlUnavailable):
            await daemon.ask(control.StatusRequest())
        assert daemon.asked == []


@pytest.mark.trio
async def test_a_refusal_comes_back_as_the_error_it_is(serve: Serve) -> None:
    async with serve() as daemon:
        daemon.error = GuaranteeNotMet("stuck", hint="wait")
        with pytest.raises(GuaranteeNotMet, match="stuck") as caught:
            await daemon.ask(control.LockRequest())
        assert caught.value.hint == "wait"


@pytest.mark.trio
@pytest.mark.parametrize("error", [ValueError("content?"), OSError(5, "content?")])
async def test_an_unforeseen_error_ends_one_request_and_tells_its_class_only(
    serve: Serve, error: Exception
) -> None:
    async with serve() as daemon:
        daemon.error = error
        with pytest.raises(DaemonBug) as caught:
            await daemon.ask(control.LockRequest())
        assert caught.value.detail == type(error).__name__


@pytest.mark.trio
async def test_an_answer_that_is_not_utf_8_ends_one_request(serve: Serve) -> None:
    async with serve() as daemon:
        daemon.status = MountStatus(
            **{name: getattr(STATUS, name) for name in STATUS.__struct_fields__}
            | {"mountpoint": "\udcff"}
        )
        with pytest.raises(DaemonBug):
            await daemon.ask(control.StatusRequest())


@pytest.mark.trio
@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[" * 4000 + b"\n",
        b'{"type":"\xff"}\n',
        b'{"type":"Locked","wiped":1}\n',
        b'{"type":"LockRequest","more":1}\n',
        b'{"type":"LockRequest"}\n{"type":"LockRequest"}\n',
    ],
)
async def test_what_is_no_request_is_refused(serve: Serve, line: bytes) -> None:
    async with serve() as daemon:
        answer = await daemon.ask_raw(line)
        assert UsageInvalid.__name__.encode() in answer
        assert daemon.asked == []


@pytest.mark.trio
async def test_a_line_without_end_is_left(serve: Serve) -> None:
    async with serve() as daemon:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await daemon.ask_raw(b"x" * 10_000) == b""
        assert daemon.asked == []


@pytest.mark.trio
async def test_peers_that_say_nothing_are_cut_off(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "_REQUEST_S", 0.2)
    async with serve() as daemon, contextlib.AsyncExitStack() as idle:
        streams = [
            await idle.enter_async_context(await trio.open_unix_socket(daemon.path))
            for _ in range(20)
        ]
        with trio.fail_after(10):
            for stream in streams:
                assert await stream.receive_some(10) == b""


@pytest.mark.trio
async def test_running_out_of_descriptors_is_outlived(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = trio.SocketListener.accept
    failures = iter([OSError(errno.EMFILE, "Too many open files")])

    async def accept_at_second_try(listener: trio.SocketListener) -> trio.SocketStream:
        for error in failures:
            raise error
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", accept_at_second_try)
    async with serve() as daemon:
        assert await daemon.ask(control.UnlockRequest()) == control.Unlocked()


def test_nobody_listening_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "socket_directory", lambda _uid: str(tmp_path))
    with pytest.raises(ControlUnavailable, match="No such file"):
        control.call("0:1", 0, control.LockRequest())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(control.socket_path("0:1", 0))
    with pytest.raises(ControlUnavailable, match="refused"):
        control.call("0:1", 0, control.LockRequest())


def test_the_sockets_place_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert control.socket_path("0:42", 0) == "/run/kmsfs/ctl/0-42.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert control.socket_path("0:42", 7) == "/run/user/7/kmsfs/0-42.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(KmsfsError, match="XDG_RUNTIME_DIR"):
        control.socket_path("0:42", 7)
