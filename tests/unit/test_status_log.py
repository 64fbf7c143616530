"""The log: one line an event, never content, and no name can forge a line."""

import io
import logging
from collections.abc import Iterator

import pytest

from kmsfs.admin import eventlog
from kmsfs.events import (
    BreakerClosed,
    BreakerOpened,
    Decrypted,
    DecryptFailed,
    Event,
    LockChanged,
    NotShown,
    Opened,
    OpenRefused,
    Published,
    PublishHeldBack,
    Wiped,
    WorkerEnded,
)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the log writes; the root logger is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    eventlog.set_up("stderr", name="kmsfs")
    yield text
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Decrypted("a", 10, 0.0123, "arn:key", "kms-blob"),
            "kmsfs: INFO: decrypted a: 10 bytes in 12 ms (kms-blob, arn:key)\n",
        ),
        (DecryptFailed("a", "KeyUnusable", "off", 1), "kmsfs: WARNING: a: KeyUnusable: off\n"),
        (
            OpenRefused("a", 5, 6, 7, "PolicyDenied"),
            "kmsfs: INFO: a: open by uid 5, pid 7 refused: PolicyDenied\n",
        ),
        (LockChanged(locked=True, by_uid=0), "kmsfs: WARNING: locked by uid 0\n"),
        (LockChanged(locked=False, by_uid=5), "kmsfs: WARNING: unlocked by uid 5\n"),
        (
            BreakerOpened("arn:key", "KmsThrottled", "slow down"),
            "kmsfs: WARNING: KMS is away for arn:key: KmsThrottled: slow down\n",
        ),
        (
            BreakerClosed("arn:key", 2.34),
            "kmsfs: WARNING: KMS answers again for arn:key, after 2.3 s\n",
        ),
        (WorkerEnded(3, "gone"), "kmsfs: WARNING: worker 3 ended: gone\n"),
        (
            NotShown("a", "RamLimitReached", "full"),
            "kmsfs: WARNING: a: not shown: RamLimitReached: full\n",
        ),
        (
            Published(3, 8192, added=1, changed=2, removed=0, failed=1),
            "kmsfs: INFO: published 3 files, 8192 bytes: 1 added, 2 changed, 0 removed, 1 failed\n",
        ),
        (PublishHeldBack("no"), "kmsfs: WARNING: files stay as they were: no\n"),
        (Opened("a", 0, 0, 1, from_cache=True), ""),
        (Wiped("a", 1, "expired"), ""),
    ],
)
def test_an_event_is_a_line_or_none(stderr: io.StringIO, event: Event, line: str) -> None:
    eventlog.LogSink().emit(event)
    assert stderr.getvalue() == line


def test_debug_shows_more_of_kmsfs_and_of_nobody_else(stderr: io.StringIO) -> None:
    eventlog.show_debug()
    try:
        eventlog.LogSink().emit(Opened("a", 5, 6, 7, from_cache=True))
        eventlog.LogSink().emit(Wiped("a", 9, "expired"))
        for name in ("botocore.endpoint", "urllib3.connectionpool", "aws_encryption_sdk"):
            logging.getLogger(name).debug("a response with its body")
    finally:
        logging.getLogger("kmsfs").setLevel(logging.NOTSET)
    assert stderr.getvalue() == (
        "kmsfs: DEBUG: a: opened by uid 5, pid 7, held already\n"
        "kmsfs: DEBUG: a: wiped, 9 bytes: expired\n"
    )


def test_a_files_name_cannot_forge_a_line(stderr: io.StringIO) -> None:
    name = "a\nkmsfs: WARNING: unlocked by uid 0\x1b[2Jü\udcff"
    eventlog.LogSink().emit(DecryptFailed(name, "KeyUnusable", "off", 1))
    assert stderr.getvalue() == (
        "kmsfs: WARNING: a\\nkmsfs: WARNING: unlocked by uid 0\\x1b[2Jü\\udcff: KeyUnusable: off\n"
    )


def test_a_failure_that_goes_on_is_a_line_every_few_seconds(stderr: io.StringIO) -> None:
    now = 100.0
    sink = eventlog.LogSink(clock=lambda: now)
    for _ in range(50):
        sink.emit(DecryptFailed("a", "KeyUnusable", "off", 1))
        sink.emit(OpenRefused("a", 5, 6, 7, "KeyUnusable"))
    sink.emit(DecryptFailed("a", "KmsThrottled", "slow", 1))
    sink.emit(DecryptFailed("b", "KeyUnusable", "off", 1))
    now += eventlog.QUIET_S
    sink.emit(DecryptFailed("a", "KeyUnusable", "off", 1))

    assert [line.partition(": ")[2].partition(": ")[2] for line in lines_of(stderr)] == [
        "a: KeyUnusable: off",
        "a: open by uid 5, pid 7 refused: KeyUnusable",
        "a: KmsThrottled: slow",
        "b: KeyUnusable: off",
        "a: KeyUnusable: off (49 more times since)",
    ]


def test_what_is_remembered_of_failures_is_bounded(stderr: io.StringIO) -> None:
    sink = eventlog.LogSink(clock=lambda: 0.0)
    for number in range(3000):
        sink.emit(DecryptFailed(f"file-{number}", "KeyUnusable", "off", 1))
    for number in (0, 2999):
        sink.emit(DecryptFailed(f"file-{number}", "KeyUnusable", "off", 1))

    assert len(lines_of(stderr)) == 3001


def lines_of(stderr: io.StringIO) -> list[str]:
    return stderr.getvalue().splitlines()
