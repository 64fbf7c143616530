"""The text format of Prometheus: what is written is read back, whatever a mount is called."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kmsfs.admin.status import (
    AuditStatus,
    AwayKey,
    Counters,
    HeldPlaintext,
    HookStatus,
    MountStatus,
    NamedProblem,
    RamStatus,
    UnattendedStatus,
)
from kmsfs.cli.status_metrics import Silent, as_exposition
from tests.support.metrics import Exposition
from tests.support.mount_status import STATUS

Record = MountStatus | UnattendedStatus | Silent

COUNTERS = Counters(
    opens_from_memory=1,
    opens_after_decryption=2,
    opens_stale=3,
    opens_refused={"PolicyDenied": 4, "other": 5},
    decryptions=6,
    decryption_s=7.5,
    decrypted_bytes=8,
    decryptions_failed={"KeyUnusable": 9},
    wiped={"expired": 10, "lock": 11},
    workers_lost=12,
    breakers_opened=13,
    published=14,
)

FUSE = replace(
    STATUS,
    mountpoint="/m",
    volume="web",
    locked=True,
    served=20,
    failing_count=21,
    ignored_count=22,
    unbound_count=23,
    stale_count=24,
    cached_count=25,
    cached_bytes=26,
    budget_bytes=27,
    worker_pids=(1, 2),
    away=(AwayKey(key="arn", reason="away", failures=3, open_for_s=1, again_in_s=1),),
    weaknesses=("any key is accepted", "the daemon's memory could be dumped"),
    audit=AuditStatus(file="/log", required=False, problem="full"),
    hooks=(
        HookStatus(match="a", run=("true",), runs=30, failures=1),
        HookStatus(match="b", run=("true",), runs=12, failures=2),
    ),
    counters=COUNTERS,
)

RAM = replace(
    FUSE,
    mountpoint="/r",
    volume=None,
    view="ramfs",
    ram=RamStatus(
        kind="ramfs",
        swappable=False,
        files=40,
        size_bytes=41,
        limit_bytes=42,
        stale=(NamedProblem(path="a", reason="away"),),
        held=(HeldPlaintext(path="b", old_path="old/b"),),
        problem="",
    ),
)

IN_BOTH_VIEWS = {
    "kmsfs_locked": 1,
    "kmsfs_files_served": 20,
    "kmsfs_files_failing": 21,
    "kmsfs_files_ignored": 22,
    "kmsfs_files_unbound": 23,
    "kmsfs_files_stale": 24,
    "kmsfs_worker_processes": 2,
    "kmsfs_keys_away": 1,
    "kmsfs_audit_failing": 1,
    "kmsfs_weaknesses": 2,
    "kmsfs_decryptions_total": 6,
    "kmsfs_decryption_seconds_total": 7.5,
    "kmsfs_decrypted_bytes_total": 8,
    "kmsfs_workers_lost_total": 12,
    "kmsfs_breakers_opened_total": 13,
    "kmsfs_hook_runs_total": 42,
    "kmsfs_hook_failures_total": 3,
}

IN_FUSE = {
    **IN_BOTH_VIEWS,
    "kmsfs_cached_bytes": 26,
    "kmsfs_budget_bytes": 27,
    "kmsfs_plaintexts_held": 25,
    "kmsfs_opens_from_memory_total": 1,
    "kmsfs_opens_after_decryption_total": 2,
    "kmsfs_opens_stale_total": 3,
    "kmsfs_sets_published_total": None,
}

IN_RAM = {
    **IN_BOTH_VIEWS,
    "kmsfs_cached_bytes": 41,
    "kmsfs_budget_bytes": 42,
    "kmsfs_plaintexts_held": 41,
    "kmsfs_opens_from_memory_total": None,
    "kmsfs_opens_after_decryption_total": None,
    "kmsfs_opens_stale_total": None,
    "kmsfs_sets_published_total": 14,
}


def written(*records: Record) -> Exposition:
    return Exposition.of(as_exposition(records).decode())


def test_a_fuse_mount_is_a_series_of_each_metric() -> None:
    found = written(FUSE)
    labels = {"mountpoint": "/m", "volume": "web", "view": "fuse"}
    assert {name: found.value(name, **labels) for name in IN_FUSE} == IN_FUSE
    assert found.value("kmsfs_up", mountpoint="/m", view="fuse") == 1


def test_a_ramfs_has_no_opens_and_its_memory_is_the_ramfs() -> None:
    found = written(RAM)
    labels = {"mountpoint": "/r", "volume": "", "view": "ramfs"}
    assert {name: found.value(name, **labels) for name in IN_RAM} == IN_RAM


def test_errors_and_reasons_are_labels() -> None:
    found = written(FUSE)
    assert found.value("kmsfs_opens_refused_total", error="PolicyDenied") == 4
    assert found.value("kmsfs_opens_refused_total", error="other") == 5
    assert found.value("kmsfs_decryptions_failed_total", error="KeyUnusable") == 9
    assert found.value("kmsfs_plaintexts_wiped_total", reason="expired") == 10
    assert found.value("kmsfs_plaintexts_wiped_total", reason="lock") == 11


def test_metrics_are_explained_typed_and_labelled_by_nothing_that_has_no_bound() -> None:
    found = written(FUSE, RAM, Silent("/dead", "fuse"))
    for family in found.families.values():
        assert family.name.startswith("kmsfs_")
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert sample.labels.keys() <= {"mountpoint", "volume", "view", "error", "reason"}
            assert sample.timestamp is None
    named = {name for name, _ in found.series}
    by_label = {
        "kmsfs_opens_refused_total",
        "kmsfs_decryptions_failed_total",
        "kmsfs_plaintexts_wiped_total",
    }
    assert named == {"kmsfs_up", *IN_FUSE, *IN_RAM, *by_label}


@pytest.mark.parametrize(
    "record", [Silent("/m", "ramfs"), UnattendedStatus(mountpoint="/m", source="/s")]
)
def test_a_mount_without_a_process_that_answers_is_not_up(record: Record) -> None:
    found = written(FUSE, record, RAM)
    assert found.value("kmsfs_up", mountpoint="/m", view="ramfs") == 0
    assert found.value("kmsfs_up", mountpoint="/r", view="ramfs") == 1
    assert found.value("kmsfs_locked", mountpoint="/m") is None


def test_no_series_is_there_twice() -> None:
    found = written(FUSE, RAM, replace(FUSE, served=99), replace(RAM, mountpoint="/m"))
    assert len(set(found.series)) == len(found.series)
    assert found.value("kmsfs_up", mountpoint="/m") == 1
    assert found.value("kmsfs_up", mountpoint="/m", view="ramfs") == 1


def test_without_a_mount_nothing_is_written() -> None:
    assert as_exposition([]) == b""


@given(mountpoint=st.text(min_size=1), volume=st.text(min_size=1))
def test_names_are_read_back_as_they_are(mountpoint: str, volume: str) -> None:
    found = written(replace(FUSE, mountpoint=mountpoint, volume=volume))
    assert found.value("kmsfs_files_served", mountpoint=mountpoint, volume=volume) == 20


@pytest.mark.parametrize(
    ("mountpoint", "label"),
    [
        ('/a "quoted" one', '/a "quoted" one'),
        ("/two\nlines{}", "/two\nlines{}"),
        ("/back\\slash\\n", "/back\\slash\\n"),
        (os.fsdecode(b"/not \xff UTF-8"), "/not \\xff UTF-8"),
    ],
)
def test_odd_mountpoints_are_escaped(mountpoint: str, label: str) -> None:
    found = written(Silent(mountpoint, "fuse"), FUSE)
    assert found.value("kmsfs_up", mountpoint=label) == 0
    assert found.value("kmsfs_up", mountpoint="/m") == 1
