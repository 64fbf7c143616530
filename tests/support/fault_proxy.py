"""A proxy in front of a key service that does what networks do.

It reads whole requests, so that faults can be counted and aimed, and forwards them over
connections of its own. In a test::

    with FaultProxy(kms.endpoint_url) as proxy:
        proxy.inject(Fault.HANG, times=1)
        ...
        assert proxy.faults == 1
"""

import contextlib
import enum
import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit


class Fault(enum.Enum):
    """What happens to a request.

    Those up to `CLOSE` never reach the service behind; of the others the service has answered.
    """

    HANG = "no answer until the client goes away"
    RESET = "the connection is reset instead of an answer"
    CLOSE = "the connection is closed instead of an answer"
    ERROR_500 = "status 500 in HTML"
    ERROR_503 = "status 503 with an empty body"
    FORBIDDEN_403 = "status 403 in HTML, as a proxy of a company answers"
    NOT_HTTP = "bytes that are no HTTP"
    HTML_200 = "status 200 in HTML, as a captive portal answers"
    EMPTY_200 = "status 200 and {}"
    LIST_200 = "status 200 and a JSON list"
    DEEP_200 = "status 200 and JSON nested without end"
    NULLS_200 = "status 200 with every expected field null"
    TYPES_200 = "status 200 with every expected field of another type"
    DELAY = "the true answer, `seconds` late"
    TRUNCATE = "half of the body, then the connection is closed"
    GARBLE = "the true headers and a body of other bytes"
    DRIP = "the true answer, a byte each `seconds`"
    OTHER_KEY = "the true answer with another KeyId"
    RESET_LATE = "the true headers, then a reset"


_OTHER_ARN = "arn:aws:kms:us-east-1:999999999999:key/00000000-0000-0000-0000-000000000000"

_HTML = b"<html><body><h1>not what you asked for</h1></body></html>"

_INVENTED: dict[Fault, tuple[int, str, bytes]] = {
    Fault.ERROR_500: (500, "text/html", _HTML),
    Fault.ERROR_503: (503, "text/plain", b""),
    Fault.FORBIDDEN_403: (403, "text/html", _HTML),
    Fault.HTML_200: (200, "text/html", _HTML),
    Fault.EMPTY_200: (200, "application/x-amz-json-1.1", b"{}"),
    Fault.LIST_200: (200, "application/x-amz-json-1.1", b"[1]"),
    Fault.DEEP_200: (200, "application/x-amz-json-1.1", b"[" * 100_000),
    Fault.NULLS_200: (
        200,
        "application/x-amz-json-1.1",
        b'{"KeyId":null,"Plaintext":null,"CiphertextBlob":null,"KeyMetadata":null}',
    ),
    Fault.TYPES_200: (
        200,
        "application/x-amz-json-1.1",
        b'{"KeyId":["a"],"Plaintext":{"b":1},"CiphertextBlob":7,"KeyMetadata":"c"}',
    ),
}


@dataclass
class _Rule:
    fault: Fault
    left: float
    operation: str | None
    key_id: str | None
    seconds: float


@dataclass(frozen=True)
class _Request:
    operation: str
    key_id: str | None
    head: bytes
    headers: tuple[tuple[str, str], ...]
    body: bytes


class FaultProxy:
    """Forwards to `upstream_url`, with the faults injected; every method works while it serves.

    Attributes:
        requests: how many were received.
        faults: how many of them met a fault.
    """

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._changed = threading.Condition(self._lock)
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.requests = 0
        self.faults = 0
        self._listener: socket.socket | None = None
        self._port = 0
        self.accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.refuse()
        for thread in self._threads:
            thread.join()

    @property
    def endpoint_url(self) -> str:
        """Where the service seems to be."""
        return f"http://127.0.0.1:{self._port}"

    def inject(
        self,
        fault: Fault,
        *,
        times: float = float("inf"),
        operation: str | None = None,
        key_id: str | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Have the next `times` requests meet a fault, of this operation and KeyId if given.

        Faults are tried in the order in which they were injected.
        """
        with self._lock:
            self._rules.append(_Rule(fault, times, operation, key_id, seconds))

    def heal(self) -> None:
        """Forget all faults; what hangs goes on hanging."""
        with self._lock:
            self._rules.clear()

    def refuse(self) -> None:
        """Refuse new connections and reset those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._changed:
            for connection in self._connections:
                _reset(connection)
            # Until their threads have closed them, they would take one more request.
            self._changed.wait_for(lambda: not self._connections, 2.0)

    def accept(self) -> None:
        """Listen, again on the same port after `refuse`."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(256)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept_all, listener)

    def wait_for_requests(self, count: int, timeout_s: float = 5.0) -> None:
        """Wait until so many requests were received.

        Raises:
            AssertionError: they were not in time.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self.requests >= count, timeout_s)
        assert came, f"{self.requests} requests, not {count}, within {timeout_s} s"

    # --- serving -------------------------------------------------------------------------------

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept_all(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._connections.add(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        upstream = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            with contextlib.suppress(OSError, http.client.HTTPException):
                for request in _requests(connection):
                    rule = self._rule_for(request)
                    if not self._answer(connection, upstream, request, rule):
                        return
        finally:
            upstream.close()
            connection.close()
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _rule_for(self, request: _Request) -> _Rule | None:
        with self._changed:
            self.requests += 1
            self._changed.notify_all()
            for rule in self._rules:
                if rule.left < 1 or rule.operation not in (None, request.operation):
                    continue
                if rule.key_id not in (None, request.key_id):
                    continue
                rule.left -= 1
                self.faults += 1
                return rule
        return None

    def _answer(
        self,
        connection: socket.socket,
        upstream: http.client.HTTPConnection,
        request: _Request,
        rule: _Rule | None,
    ) -> bool:
        """Answer one request; whether the connection can serve another."""
        fault = rule.fault if rule else None
        seconds = rule.seconds if rule else 0.0
        match fault:
            case Fault.HANG:
                while not self._stopping.is_set() and connection.recv(65536):
                    pass
                return False
            case Fault.RESET:
                _reset(connection)
                return False
            case Fault.CLOSE:
                return False
            case Fault.NOT_HTTP:
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n")
                return False
        if fault in _INVENTED:
            status, content_type, body = _INVENTED[fault]
            headers = [("Content-Type", content_type)]
        else:
            status, headers, body = _forward(upstream, request)
        match fault:
            case Fault.DELAY:
                self._stopping.wait(seconds)
            case Fault.GARBLE:
                body = bytes(byte ^ 0x55 for byte in body)
            case Fault.OTHER_KEY:
                body = json.dumps({**json.loads(body), "KeyId": _OTHER_ARN}).encode()
        head = _head(status, headers, len(body))
        match fault:
            case Fault.TRUNCATE:
                connection.sendall(head + body[: len(body) // 2])
                return False
            case Fault.RESET_LATE:
                connection.sendall(head)
                _reset(connection)
                return False
            case Fault.DRIP:
                for byte in head + body:
                    connection.sendall(bytes((byte,)))
                    if self._stopping.wait(seconds):
                        return False
                return True
        connection.sendall(head + body)
        return True


class _Reader:
    """Reads a socket without holding it open, so that closing it is what the peer sees."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def line(self) -> bytes:
        """Up to and with the next line feed; what there is at the end."""
        while b"\n" not in self._buffer and self._receive():
            pass
        return self._take(self._buffer.find(b"\n") + 1 or len(self._buffer))

    def exactly(self, size: int) -> bytes:
        """So many bytes; fewer at the end."""
        while len(self._buffer) < size and self._receive():
            pass
        return self._take(size)

    def _receive(self) -> bool:
        received = self._connection.recv(65536)
        self._buffer += received
        return bool(received)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def _requests(connection: socket.socket) -> Iterator[_Request]:
    """Requests of a connection until its client closes it."""
    reader = _Reader(connection)
    while line := reader.line():
        headers = []
        while (field := reader.line()) not in (b"\r\n", b""):
            name, _, value = field.decode("latin-1").partition(":")
            headers.append((name.strip(), value.strip()))
        lower = {name.lower(): value for name, value in headers}
        if lower.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(lower.get("content-length", "0"))
        body = reader.exactly(length)
        if len(body) < length:
            # Its client was killed. The service behind would wait for the rest, and we for it.
            return
        operation = lower.get("x-amz-target", "").rpartition(".")[2]
        yield _Request(operation, _key_id(body), line, tuple(headers), body)


def _key_id(body: bytes) -> str | None:
    with contextlib.suppress(ValueError):
        given = json.loads(body)
        if isinstance(given, dict) and isinstance(given.get("KeyId"), str):
            return str(given["KeyId"])
    return None


def _forward(
    upstream: http.client.HTTPConnection, request: _Request
) -> tuple[int, list[tuple[str, str]], bytes]:
    method, target, _ = request.head.decode("latin-1").split(" ", 2)
    upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers:
        if name.lower() not in ("connection", "expect"):
            upstream.putheader(name, value)
    upstream.endheaders(request.body)
    answer = upstream.getresponse()
    body = answer.read()
    dropped = {"content-length", "connection", "transfer-encoding"}
    return answer.status, [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped], body


def _head(status: int, headers: list[tuple[str, str]], length: int) -> bytes:
    reason = http.client.responses.get(status, "")
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("latin-1")


def _reset(connection: socket.socket) -> None:
    """Have its thread, which may be reading, close a connection with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
