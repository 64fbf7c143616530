"""A strict stand-in for AWS KMS, written from its API reference and service model.

Signatures, types and bounds are verified; keys have states, owners and policies; every refusal has
the code and the status of KMS. It also answers STS AssumeRole and GetCallerIdentity, and as the
metadata service of a container. One server plays all regions, which requests name in their
signatures, and as many accounts as there are identities and keys.

In a test::

    with StrictKms() as kms:
        key = kms.create_key()
        env = kms.env()                      # for child processes
        kms.deny(kms.admin, "Decrypt", key)  # from now on
        assert kms.calls("Decrypt")[-1].error == "AccessDeniedException"

As a process, `python -m tests.support.strict_kms --help`; it ends with its standard input.
"""

import argparse
import contextlib
import http.server
import json
import os
import socket
import sys
import threading
import urllib.parse
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

import botocore.session
from botocore.config import Config

from tests.support.strict_identities import (
    Identity,
    assume_role_answer,
    caller_identity_answer,
    container_answer,
    sts_error_answer,
)
from tests.support.strict_model import ServiceError, encode_output, kms_model, parse_input
from tests.support.strict_operations import OPERATIONS
from tests.support.strict_state import ACCOUNT, REGION, Call, Draft, StrictState

__all__ = ["ACCOUNT", "REGION", "Call", "Identity", "StrictKms"]

_JSON = "application/x-amz-json-1.1"
_CONTAINER_LIFETIME_S = 6 * 3600.0

Answer = tuple[int, str, bytes]
"""Status, content type, body."""


class StrictKms(StrictState):
    """The server. What tests set and read is described at `StrictState`."""

    def __init__(self, *, verify_signatures: bool = True) -> None:
        super().__init__(verify_signatures=verify_signatures)
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """On 127.0.0.1."""
        return int(self._server.server_address[1])

    @property
    def endpoint_url(self) -> str:
        """Of KMS and STS."""
        return f"http://127.0.0.1:{self.port}"

    def env(self, identity: Identity | None = None, **more: str) -> dict[str, str]:
        """Environment for a child process that calls as `identity` (the admin by default)."""
        identity = identity or self.admin
        found = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "LC_ALL": "C.UTF-8",
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": identity.access_key_id,
            "AWS_SECRET_ACCESS_KEY": identity.secret_access_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if identity.session_token is not None:
            found["AWS_SESSION_TOKEN"] = identity.session_token
        return {**found, **more}

    def client(self, identity: Identity | None = None, region: str = REGION) -> Any:
        """A client of botocore, with one attempt a call."""
        identity = identity or self.admin
        return botocore.session.Session().create_client(
            "kms",
            region_name=region,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=identity.access_key_id,
            aws_secret_access_key=identity.secret_access_key,
            aws_session_token=identity.session_token,
            config=Config(retries={"total_max_attempts": 1}, read_timeout=5),
        )

    def answer_get(self) -> Answer:
        """What the metadata service of a container answers: the admin's credentials."""
        answer = container_answer(self.admin, self.role_lifetime_s or _CONTAINER_LIFETIME_S)
        return 200, "application/json", json.dumps(answer).encode()

    def answer_post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a request to KMS or STS; names of headers are in small letters."""
        draft = Draft()
        code = None
        serve = self._serve_kms if "x-amz-target" in headers else self._serve_sts
        try:
            return serve(draft, headers, body)
        except ServiceError as refusal:
            code = refusal.code
            if serve == self._serve_sts:
                text = sts_error_answer(code, refusal.message, str(uuid.uuid4()))
                return refusal.status, "text/xml", text
            return refusal.status, _JSON, _kms_error_answer(refusal)
        finally:
            self.note(draft, code)

    def _serve_kms(self, draft: Draft, headers: Mapping[str, str], body: bytes) -> Answer:
        prefix, _, draft.operation = headers["x-amz-target"].partition(".")
        operation = OPERATIONS.get(draft.operation)
        if prefix != kms_model().metadata["targetPrefix"] or operation is None:
            raise ServiceError("UnknownOperationException", None, 404)
        self.authenticate(draft, headers, body, "kms")
        try:
            raw = json.loads(body or b"{}")
        except ValueError:
            raise ServiceError("SerializationException") from None
        given = parse_input(draft.operation, raw)
        draft.context = given.get("EncryptionContext") or given.get("SourceEncryptionContext", {})
        self.wait(self.latency_s)
        self.raise_injected(draft, None)
        answer = operation(self, draft, given)
        return 200, _JSON, json.dumps(encode_output(answer)).encode()

    def _serve_sts(self, draft: Draft, headers: Mapping[str, str], body: bytes) -> Answer:
        given = dict(urllib.parse.parse_qsl(body.decode()))
        draft.operation = given.get("Action", "unknown")
        self.authenticate(draft, headers, body, "sts")
        if draft.operation not in ("AssumeRole", "GetCallerIdentity"):
            raise ServiceError("InvalidAction", "Could not find operation")
        self.wait(self.latency_s)
        self.raise_injected(draft, None)
        if draft.operation == "GetCallerIdentity":
            # Needs no permission: STS API Reference.
            return 200, "text/xml", caller_identity_answer(draft.identity, str(uuid.uuid4()))
        identity = self.assume_role(draft, given["RoleArn"], given["RoleSessionName"])
        lifetime_s = self.role_lifetime_s or float(given.get("DurationSeconds", "3600"))
        return 200, "text/xml", assume_role_answer(identity, lifetime_s, str(uuid.uuid4()))


def _kms_error_answer(refusal: ServiceError) -> bytes:
    answer = {"__type": refusal.code}
    if refusal.message is not None:
        # KMS writes the name small in its own errors and large in those of the front end.
        own = refusal.code in kms_model().shape_names
        answer["message" if own else "Message"] = refusal.message
    return json.dumps(answer).encode()


class _Server(http.server.ThreadingHTTPServer):
    """Knows its connections, so that they can be ended."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, kms: StrictKms) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kms = kms
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Have every connection's thread see the end of its client."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news here; anything else is a bug to be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without these two every answer waits for a delayed acknowledgement, 45 ms.
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def do_GET(self) -> None:
        self._send(self.server.kms.answer_get())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._send(self.server.kms.answer_post(headers, body))

    def _send(self, answer: Answer) -> None:
        status, content_type, body = answer
        self.send_response(status)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Cache-Control", "no-cache, no-store, must-revalidate, private")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """The journal says more."""


def main(arguments: list[str]) -> None:
    """Serve until standard input ends; the line printed says where and with which keys."""
    parser = argparse.ArgumentParser(prog="strict_kms")
    parser.add_argument("--keys", type=int, default=1, help="how many keys to make")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of every request")
    parser.add_argument(
        "--slow-key", action="append", default=[], metavar="N:MS", help="more for key N (from 0)"
    )
    parser.add_argument(
        "--slow-context",
        action="append",
        default=[],
        metavar="KEY=VALUE:MS",
        help="more for requests with this pair in their encryption context",
    )
    parser.add_argument("--no-signatures", action="store_true", help="do not verify signatures")
    given = parser.parse_args(arguments)
    with StrictKms(verify_signatures=not given.no_signatures) as kms:
        kms.latency_s = given.latency_ms / 1000
        keys = [kms.create_key() for _ in range(given.keys)]
        for text in given.slow_key:
            number, _, latency_ms = text.partition(":")
            keys[int(number)].latency_s = float(latency_ms) / 1000
        for text in given.slow_context:
            pair, _, latency_ms = text.rpartition(":")
            name, _, value = pair.partition("=")
            kms.slow_contexts[name, value] = float(latency_ms) / 1000
        known = {
            "endpoint_url": kms.endpoint_url,
            "key_arns": [key.arn for key in keys],
            "env": kms.env(),
        }
        print(json.dumps(known), flush=True)
        deque(sys.stdin.buffer, maxlen=0)


if __name__ == "__main__":
    main(sys.argv[1:])
