"""The counters of a mount: each event counts once, where it belongs, and nothing grows for ever."""

import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmsfs.admin.metrics import MAX_LABELS, OTHER, Metrics
from kmsfs.admin.status import Counters
from kmsfs.errors import KmsfsError
from kmsfs.events import (
    BreakerClosed,
    BreakerOpened,
    ConfinementWeak,
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

NOTHING = Counters()

COUNTED: list[tuple[Event, Counters]] = [
    (Opened("a", 0, 0, 1, from_cache=True), Counters(opens_from_memory=1)),
    (Opened("a", 0, 0, 1, from_cache=False), Counters(opens_after_decryption=1)),
    (Opened("a", 0, 0, 1, from_cache=True, stale=True, age_s=900.0), Counters(opens_stale=1)),
    (OpenRefused("a", 0, 0, 1, "PolicyDenied"), Counters(opens_refused={"PolicyDenied": 1})),
    (
        Decrypted("a", 300, 0.25, "arn:key", "kms-blob"),
        Counters(decryptions=1, decryption_s=0.25, decrypted_bytes=300),
    ),
    (DecryptFailed("a", "KeyUnusable", "off", 1), Counters(decryptions_failed={"KeyUnusable": 1})),
    (Wiped("a", 300, "expired"), Counters(wiped={"expired": 1})),
    (WorkerEnded(3, "gone"), Counters(workers_lost=1)),
    (BreakerOpened("arn:key", "KmsThrottled", "slow"), Counters(breakers_opened=1)),
    (Published(3, 8192, added=1, changed=2, removed=0, failed=1), Counters(published=1)),
    (LockChanged(locked=True, by_uid=0), NOTHING),
    (BreakerClosed("arn:key", 2.0), NOTHING),
    (NotShown("a", "RamLimitReached", "full"), NOTHING),
    (PublishHeldBack("no"), NOTHING),
    (ConfinementWeak("workers", ("no Landlock",)), NOTHING),
]


@pytest.mark.parametrize(("event", "counters"), COUNTED, ids=lambda given: type(given).__name__)
def test_an_event_counts_once(event: Event, counters: Counters) -> None:
    metrics = Metrics()
    metrics.emit(event)
    assert metrics.counters == counters


def test_every_kind_of_event_is_known_here() -> None:
    assert {type(event) for event, _ in COUNTED} == set(get_args(Event))


def test_counts_add_up() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.emit(Decrypted("a", 300, 0.25, "arn:key", "kms-blob"))
        metrics.emit(Wiped("a", 300, "expired"))
    metrics.emit(Wiped("a", 300, "lock"))
    assert metrics.counters == Counters(
        decryptions=2, decryption_s=0.5, decrypted_bytes=600, wiped={"expired": 2, "lock": 1}
    )


def test_counters_that_were_handed_out_stay_as_they_were() -> None:
    metrics = Metrics()
    metrics.emit(Wiped("a", 300, "lock"))
    before = metrics.counters
    metrics.emit(Wiped("a", 300, "lock"))
    assert before.wiped == {"lock": 1}


@given(st.lists(st.from_type(Event)))  # type: ignore[arg-type] # a union is as good as a type
def test_no_event_is_ever_refused(events: list[Event]) -> None:
    metrics = Metrics()
    for event in events:
        metrics.emit(event)
    counters = metrics.counters
    refused = sum(counters.opens_refused.values())
    assert refused == sum(isinstance(event, OpenRefused) for event in events)


def test_labels_are_bounded_and_nothing_is_lost_beyond_them() -> None:
    metrics = Metrics()
    many = 10 * MAX_LABELS
    for number in range(many):
        metrics.emit(OpenRefused("a", 0, 0, 1, f"Error{number}"))
        metrics.emit(DecryptFailed("a", f"Error{number}", "", 1))
        metrics.emit(Wiped("a", 1, f"reason {number}"))
    counters = metrics.counters
    for by_label in (counters.opens_refused, counters.decryptions_failed, counters.wiped):
        assert len(by_label) == MAX_LABELS + 1
        assert by_label[OTHER] == many - MAX_LABELS
        assert sum(by_label.values()) == many


def test_every_error_of_kmsfs_is_told_apart() -> None:
    metrics = Metrics()
    names = every_error(KmsfsError)
    for name in names:
        metrics.emit(OpenRefused("a", 0, 0, 1, name))
    assert metrics.counters.opens_refused == dict.fromkeys(names, 1)


def every_error(root: type[KmsfsError]) -> set[str]:
    found = {cls for cls in root.__subclasses__() if cls.__module__ == "kmsfs.errors"}
    return {cls.__name__ for cls in found}.union(*map(every_error, found))


def test_the_daemon_imports_no_library_for_it() -> None:
    code = (
        "import sys, kmsfs.daemon.__main__, kmsfs.daemon.composition, kmsfs.views.fuse\n"
        "print('kmsfs.admin.metrics' in sys.modules, 'prometheus_client' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True False\n"
