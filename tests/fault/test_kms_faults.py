"""What the network and KMS's own failures do to one call: typed errors, in bounded time."""

import contextlib
import gc
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmsfs.errors import (
    DeadlineExceeded,
    KmsAnswerInvalid,
    KmsfsError,
    KmsThrottled,
    KmsUnreachable,
)
from kmsfs.keys import aws_session
from kmsfs.keys.aws import AwsKeyService
from kmsfs.settings import KmsSettings
from tests.support.aws_files import AwsFiles
from tests.support.canary import carries, secret
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

CONTEXT = {"service": "web"}
PLAINTEXT = secret("faults", 64)

ANSWER_INVALID = (
    Fault.HTML_200,
    Fault.EMPTY_200,
    Fault.LIST_200,
    Fault.DEEP_200,
    Fault.NULLS_200,
    Fault.TYPES_200,
    Fault.FORBIDDEN_403,
    Fault.TRUNCATE,
    Fault.GARBLE,
    Fault.OTHER_KEY,
)
UNREACHABLE = (
    Fault.RESET,
    Fault.CLOSE,
    Fault.NOT_HTTP,
    Fault.ERROR_500,
    Fault.ERROR_503,
    Fault.HANG,
    Fault.RESET_LATE,
)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how often a call is tried; once unless a test says otherwise, as retries wait."""

    def set_attempts(count: int) -> None:
        monkeypatch.setattr(aws_session, "ATTEMPTS", count)

    set_attempts(1)
    return set_attempts


@pytest.fixture
def keys(
    strict_kms: StrictKms,
    fault_proxy: FaultProxy,
    aws_files: AwsFiles,
    attempts: object,
    request: pytest.FixtureRequest,
) -> AwsKeyService:
    """KMS behind the proxy; with little patience where a test's fault is a server that hangs."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and parameters.params.get("fault") is Fault.HANG:
        aws_files.monkeypatch.setattr(aws_session, "READ_TIMEOUT_S", 0.5)
    aws_files.set_environment(strict_kms.env(AWS_ENDPOINT_URL_KMS=fault_proxy.endpoint_url))
    return AwsKeyService(KmsSettings(), deadline_s=5.0)


@pytest.fixture
def decrypt(keys: AwsKeyService, kms_key: KmsKey) -> Callable[[], bytes]:
    blob = kms_key.seal(PLAINTEXT, CONTEXT)
    return lambda: keys.decrypt(blob, key_id=kms_key.arn, encryption_context=CONTEXT).plaintext


def test_there_is_nothing_wrong_without_a_fault(decrypt: Callable[[], bytes]) -> None:
    assert decrypt() == PLAINTEXT


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(fault, KmsAnswerInvalid) for fault in ANSWER_INVALID]
    + [(fault, KmsUnreachable) for fault in UNREACHABLE],
)
def test_fault_is_a_typed_error_and_the_next_call_works(
    decrypt: Callable[[], bytes],
    fault_proxy: FaultProxy,
    fault: Fault,
    expected: type[KmsfsError],
) -> None:
    fault_proxy.inject(fault, times=1)
    with pytest.raises(KmsfsError) as caught:
        decrypt()
    assert type(caught.value) is expected
    assert fault_proxy.faults == 1
    assert decrypt() == PLAINTEXT


@pytest.mark.parametrize("fault", [*ANSWER_INVALID, *UNREACHABLE])
def test_error_names_the_operation_and_no_content(
    decrypt: Callable[[], bytes], fault_proxy: FaultProxy, fault: Fault
) -> None:
    fault_proxy.inject(fault)
    with pytest.raises(KmsfsError) as caught:
        decrypt()
    assert caught.value.detail.startswith("Decrypt")
    assert "not what you asked for" not in caught.value.detail
    assert not carries(repr(caught.value.__cause__))


@pytest.mark.parametrize(
    "fault", [Fault.EMPTY_200, Fault.LIST_200, Fault.NULLS_200, Fault.TYPES_200, Fault.OTHER_KEY]
)
@pytest.mark.parametrize("operation", ["encrypt", "generate_data_key", "resolve_key_arn"])
def test_no_operation_believes_an_answer_that_kms_never_gives(
    keys: AwsKeyService, kms_key: KmsKey, fault_proxy: FaultProxy, fault: Fault, operation: str
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "encrypt": lambda: keys.encrypt(b"-", key_id=kms_key.arn, encryption_context={}),
        "generate_data_key": lambda: keys.generate_data_key(
            key_id=kms_key.arn, size_bytes=32, encryption_context={}
        ),
        "resolve_key_arn": lambda: keys.resolve_key_arn(kms_key.arn),
    }
    fault_proxy.inject(fault)
    if (operation, fault) == ("resolve_key_arn", Fault.OTHER_KEY):
        # DescribeKey has its ARN elsewhere, and this one was not touched.
        assert calls[operation]() == kms_key.arn
        return
    with pytest.raises(KmsAnswerInvalid):
        calls[operation]()


def test_another_key_is_noticed_by_key_id_too(
    keys: AwsKeyService, kms_key: KmsKey, fault_proxy: FaultProxy
) -> None:
    blob = kms_key.seal(PLAINTEXT, {})
    fault_proxy.inject(Fault.OTHER_KEY)
    with pytest.raises(KmsAnswerInvalid):
        keys.decrypt(blob, key_id=kms_key.key_id, encryption_context={})


def test_refused_connection_is_unreachable_until_accepted(
    decrypt: Callable[[], bytes], fault_proxy: FaultProxy
) -> None:
    assert decrypt() == PLAINTEXT
    fault_proxy.refuse()
    with pytest.raises(KmsUnreachable, match=r"127\.0\.0\.1"):
        decrypt()
    fault_proxy.accept()
    assert decrypt() == PLAINTEXT


def test_certificate_that_nobody_vouches_for_is_unreachable_and_says_why(
    strict_kms: StrictKms, aws_files: AwsFiles, self_signed_port: int, attempts: object
) -> None:
    aws_files.set_environment(strict_kms.env())
    url = f"https://user:canary@127.0.0.1:{self_signed_port}"
    keys = AwsKeyService(KmsSettings(endpoint_url=url))
    with pytest.raises(KmsUnreachable, match="TLS") as caught:
        keys.resolve_key_arn("alias/test")
    assert "CA" in caught.value.hint
    assert "canary" not in caught.value.detail


@pytest.fixture
def self_signed_port(tmp_path: Path) -> Iterator[int]:
    """A TLS server whose certificate is its own; on 127.0.0.1."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext"]
        + ["subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def shake_hands() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=shake_hands)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.ERROR_500, Fault.HANG])
def test_passing_fault_is_outlived_by_a_second_attempt(
    decrypt: Callable[[], bytes],
    attempts: Callable[[int], None],
    fault_proxy: FaultProxy,
    fault: Fault,
) -> None:
    attempts(2)
    fault_proxy.inject(fault, times=1)
    assert decrypt() == PLAINTEXT
    assert fault_proxy.requests == 2


def test_passing_throttling_is_outlived_by_a_second_attempt(
    decrypt: Callable[[], bytes], attempts: Callable[[int], None], strict_kms: StrictKms
) -> None:
    attempts(2)
    strict_kms.fail("ThrottlingException", times=1)
    assert decrypt() == PLAINTEXT


def test_lasting_throttling_ends_as_that(
    decrypt: Callable[[], bytes], attempts: Callable[[int], None], strict_kms: StrictKms
) -> None:
    attempts(2)
    strict_kms.fail("ThrottlingException")
    with pytest.raises(KmsThrottled):
        decrypt()
    assert len(strict_kms.calls("Decrypt")) == 2


@pytest.mark.parametrize("code", ["AccessDeniedException", "DisabledException"])
def test_refusal_is_not_tried_again(
    decrypt: Callable[[], bytes], attempts: Callable[[int], None], strict_kms: StrictKms, code: str
) -> None:
    attempts(3)
    strict_kms.fail(code)
    with pytest.raises(KmsfsError):
        decrypt()
    assert len(strict_kms.calls("Decrypt")) == 1


# --- deadlines ---------------------------------------------------------------------------------


@pytest.fixture
def took_s() -> Callable[[], float]:
    started = time.monotonic()
    return lambda: time.monotonic() - started


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.DELAY, Fault.DRIP])
def test_call_ends_at_its_deadline(
    keys: AwsKeyService,
    decrypt: Callable[[], bytes],
    monkeypatch: pytest.MonkeyPatch,
    fault_proxy: FaultProxy,
    fault: Fault,
) -> None:
    monkeypatch.setattr(aws_session, "READ_TIMEOUT_S", 30.0)
    decrypt()
    fault_proxy.inject(fault, seconds=30.0 if fault is Fault.DELAY else 0.05)
    keys.set_deadline(0.4)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        decrypt()
    assert 0.35 < time.monotonic() - started < 4.0
    fault_proxy.heal()
    keys.set_deadline(None)
    assert decrypt() == PLAINTEXT


def test_deadline_holds_over_attempts_and_the_waits_between_them(
    keys: AwsKeyService,
    decrypt: Callable[[], bytes],
    attempts: Callable[[int], None],
    strict_kms: StrictKms,
    took_s: Callable[[], float],
) -> None:
    attempts(20)
    strict_kms.fail("ThrottlingException")
    keys.set_deadline(0.6)
    with pytest.raises(DeadlineExceeded):
        decrypt()
    assert took_s() < 4.0


def test_deadline_holds_for_several_calls_together(
    keys: AwsKeyService,
    decrypt: Callable[[], bytes],
    strict_kms: StrictKms,
    kms_key: KmsKey,
) -> None:
    kms_key.latency_s = 0.2
    keys.set_deadline(1.0)

    def decrypt_often() -> None:
        for _ in range(20):
            decrypt()

    with pytest.raises(DeadlineExceeded):
        decrypt_often()
    assert strict_kms.calls("Decrypt")


def test_each_call_has_the_deadline_of_the_settings_otherwise(
    decrypt: Callable[[], bytes], keys: AwsKeyService, fault_proxy: FaultProxy
) -> None:
    keys = AwsKeyService(KmsSettings(deadline_s=0.15))
    fault_proxy.inject(Fault.HANG)
    for _ in range(2):
        # Whichever notices first, the connection's own limit or the timer over it.
        with pytest.raises(DeadlineExceeded, match=r"0\.15 s|within the deadline"):
            keys.resolve_key_arn("alias/test")


def test_timer_and_handler_of_others_are_left_as_they_were(
    keys: AwsKeyService, decrypt: Callable[[], bytes], fault_proxy: FaultProxy
) -> None:
    def own(_number: int, _frame: object) -> None:
        """Somebody else's."""

    before = signal.signal(signal.SIGALRM, own)
    try:
        decrypt()
        assert signal.getsignal(signal.SIGALRM) is own
        fault_proxy.inject(Fault.HANG)
        keys.set_deadline(0.1)
        with pytest.raises(DeadlineExceeded):
            decrypt()
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fault", [Fault.HANG])
def test_outside_the_main_thread_no_attempt_begins_after_the_deadline(
    keys: AwsKeyService,
    decrypt: Callable[[], bytes],
    attempts: Callable[[int], None],
    fault_proxy: FaultProxy,
    fault: Fault,
) -> None:
    attempts(20)
    decrypt()
    fault_proxy.inject(fault)
    keys.set_deadline(0.1)
    raised: list[BaseException] = []

    def call() -> None:
        try:
            decrypt()
        except KmsfsError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(10)
    assert [type(error) for error in raised] == [DeadlineExceeded]
    assert fault_proxy.faults == 1


# Botocore has no chance to tidy up after the program that it waited for.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_credential_process_that_hangs_is_given_up(
    aws_files: AwsFiles, strict_kms: StrictKms, took_s: Callable[[], float]
) -> None:
    fifo = aws_files.directory / "never"
    os.mkfifo(fifo)
    aws_files.write_process("web", "cat", str(fifo))
    keys = AwsKeyService(KmsSettings(profile="web", region="us-east-1"), deadline_s=0.3)
    with pytest.raises(DeadlineExceeded):
        keys.resolve_key_arn("alias/test")
    assert took_s() < 4.0
    gc.collect()
    os.close(os.open(fifo, os.O_WRONLY))


def test_container_endpoint_that_hangs_is_given_up(
    aws_files: AwsFiles, fault_proxy: FaultProxy, took_s: Callable[[], float]
) -> None:
    fault_proxy.inject(Fault.HANG)
    aws_files.monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    aws_files.monkeypatch.setenv(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{fault_proxy.endpoint_url}/credentials"
    )
    keys = AwsKeyService(KmsSettings(), deadline_s=0.3)
    with pytest.raises(DeadlineExceeded):
        keys.resolve_key_arn("alias/test")
    assert took_s() < 4.0


def test_sts_that_hangs_is_given_up(
    aws_files: AwsFiles, strict_kms: StrictKms, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Fault.HANG)
    aws_files.set_environment(strict_kms.env(AWS_ENDPOINT_URL_STS=fault_proxy.endpoint_url))
    role = strict_kms.create_role("reader", strict_kms.admin)
    aws_files.monkeypatch.setattr(aws_session, "READ_TIMEOUT_S", 30.0)
    keys = AwsKeyService(KmsSettings(role_arn=role), deadline_s=2.0)
    with pytest.raises(DeadlineExceeded):
        keys.resolve_key_arn("alias/test")
    assert fault_proxy.requests == 1
