"""What `kmsfs status --metrics` writes: the Prometheus text format, a series for each mount.

Imports prometheus_client, which costs time: only where it is asked for.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kmsfs.admin.status import MountStatus, UnattendedStatus


@dataclass(frozen=True, slots=True)
class Silent:
    """A mount that did not answer.

    Attributes:
        mountpoint: as in the mount table; may be of bytes that are no UTF-8.
        view: `fuse` or `ramfs`.
    """

    mountpoint: str
    view: str


@dataclass(frozen=True, slots=True)
class _Number:
    """A metric with one number for each mount.

    Attributes:
        view: the one that it has a meaning in; None for both.
    """

    name: str
    meaning: str
    of: Callable[[MountStatus], float]
    view: str | None = None


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A metric with a number for each value of a label of its own."""

    name: str
    meaning: str
    label: str
    of: Callable[[MountStatus], dict[str, int]]


_GAUGES: Final = (
    _Number("kmsfs_locked", "Whether the mount is locked.", lambda s: s.locked),
    _Number("kmsfs_files_served", "Files in the source that are served.", lambda s: s.served),
    _Number(
        "kmsfs_files_failing",
        "Files whose last open failed, or that can never be decrypted.",
        lambda s: s.failing_count,
    ),
    _Number(
        "kmsfs_files_ignored",
        "Files in the source that are not served.",
        lambda s: s.ignored_count,
    ),
    _Number(
        "kmsfs_files_unbound",
        "Files that are served although they are not bound to their place.",
        lambda s: s.unbound_count,
    ),
    _Number(
        "kmsfs_files_stale",
        "Files held past their time, which are served only while KMS cannot be asked again.",
        lambda s: s.stale_count,
    ),
    _Number(
        "kmsfs_cached_bytes",
        "Memory that plaintexts take: locked memory, or the ramfs.",
        lambda s: s.cached_bytes if s.ram is None else s.ram.size_bytes,
    ),
    _Number(
        "kmsfs_budget_bytes",
        "Memory that plaintexts may take.",
        lambda s: s.budget_bytes if s.ram is None else s.ram.limit_bytes,
    ),
    _Number(
        "kmsfs_plaintexts_held",
        "Plaintexts in locked memory or in the ramfs, those of replaced files among them.",
        lambda s: s.cached_count if s.ram is None else s.ram.files + len(s.ram.held),
    ),
    _Number("kmsfs_worker_processes", "Decrypting processes.", lambda s: len(s.worker_pids)),
    _Number(
        "kmsfs_keys_away",
        "Keys that KMS is not asked for just now, having been away several times in a row.",
        lambda s: len(s.away),
    ),
    _Number(
        "kmsfs_audit_failing",
        "Whether the last record of the audit log could not be written; 0 without one.",
        lambda s: s.audit is not None and s.audit.problem != "",
    ),
    _Number(
        "kmsfs_weaknesses",
        "Guarantees that do not hold: see the lines weaker of kmsfs status.",
        lambda s: len(s.weaknesses),
    ),
)

_COUNTERS: Final = (
    _Number(
        "kmsfs_opens_from_memory_total",
        "Opens of a plaintext that was held, within its time.",
        lambda s: s.counters.opens_from_memory,
        view="fuse",
    ),
    _Number(
        "kmsfs_opens_after_decryption_total",
        "Opens that waited for KMS.",
        lambda s: s.counters.opens_after_decryption,
        view="fuse",
    ),
    _Number(
        "kmsfs_opens_stale_total",
        "Opens of a plaintext past its time, since KMS could not be asked again.",
        lambda s: s.counters.opens_stale,
        view="fuse",
    ),
    _Number(
        "kmsfs_decryptions_total", "Files that were decrypted.", lambda s: s.counters.decryptions
    ),
    _Number(
        "kmsfs_decryption_seconds_total",
        "Time that those decryptions took, all together.",
        lambda s: s.counters.decryption_s,
    ),
    _Number(
        "kmsfs_decrypted_bytes_total",
        "Size of the plaintexts of those decryptions.",
        lambda s: s.counters.decrypted_bytes,
    ),
    _Number(
        "kmsfs_workers_lost_total",
        "Decrypting processes that ended in the middle of a request.",
        lambda s: s.counters.workers_lost,
    ),
    _Number(
        "kmsfs_breakers_opened_total",
        "How often KMS was found to be away for a key.",
        lambda s: s.counters.breakers_opened,
    ),
    _Number(
        "kmsfs_sets_published_total",
        "How often the ramfs showed a new set of files.",
        lambda s: s.counters.published,
        view="ramfs",
    ),
    _Number(
        "kmsfs_hook_runs_total",
        "Runs of on-change hooks.",
        lambda s: sum(hook.runs for hook in s.hooks),
    ),
    _Number(
        "kmsfs_hook_failures_total",
        "Runs of on-change hooks that failed.",
        lambda s: sum(hook.failures for hook in s.hooks),
    ),
)

_COUNTERS_BY_LABEL: Final = (
    _Numbers(
        "kmsfs_opens_refused_total",
        "Opens that failed, by error.",
        "error",
        lambda s: s.counters.opens_refused,
    ),
    _Numbers(
        "kmsfs_decryptions_failed_total",
        "Decryptions that failed, by error.",
        "error",
        lambda s: s.counters.decryptions_failed,
    ),
    _Numbers(
        "kmsfs_plaintexts_wiped_total",
        "Plaintexts in locked memory that were overwritten, by reason.",
        "reason",
        lambda s: s.counters.wiped,
    ),
)

# All but `kmsfs_up` have them: of a mount that does not answer the volume is not known, and a
# series whose labels change with its value could not be watched.
_LABELS: Final = ("mountpoint", "volume", "view")


def as_exposition(records: Iterable[MountStatus | UnattendedStatus | Silent]) -> bytes:
    """Mounts as metrics, in UTF-8.

    Of several at one mountpoint the last counts, which covers the others: two samples of one
    series would have all of them refused.
    """
    registry = CollectorRegistry()
    registry.register(_Mounts({record.mountpoint: record for record in records}))
    return generate_latest(registry)


class _Mounts(Collector):
    def __init__(self, records: dict[str, MountStatus | UnattendedStatus | Silent]) -> None:
        self._records = [records[mountpoint] for mountpoint in sorted(records)]
        self._answering = [r for r in self._records if isinstance(r, MountStatus)]

    def collect(self) -> Iterator[Metric]:
        """Every metric that has a sample."""
        if self._records:
            yield self._up()
        families = [
            *(self._numbers(GaugeMetricFamily, metric) for metric in _GAUGES),
            *(self._numbers(CounterMetricFamily, metric) for metric in _COUNTERS),
            *map(self._by_label, _COUNTERS_BY_LABEL),
        ]
        yield from (family for family in families if family.samples)

    def _up(self) -> Metric:
        family = GaugeMetricFamily(
            "kmsfs_up",
            "Whether a process of kmsfs answers for the mount.",
            labels=("mountpoint", "view"),
        )
        for record in self._records:
            labels = (_text(record.mountpoint), record.view)
            family.add_metric(labels, isinstance(record, MountStatus))
        return family

    def _numbers(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], metric: _Number
    ) -> Metric:
        family = kind(metric.name, metric.meaning, labels=_LABELS)
        for status in self._answering:
            if metric.view in (None, status.view):
                family.add_metric(_labels_of(status), metric.of(status))
        return family

    def _by_label(self, metric: _Numbers) -> Metric:
        labels = (*_LABELS, metric.label)
        family = CounterMetricFamily(metric.name, metric.meaning, labels=labels)
        for status in self._answering:
            for label, count in sorted(metric.of(status).items()):
                family.add_metric((*_labels_of(status), label), count)
        return family


def _labels_of(status: MountStatus) -> tuple[str, str, str]:
    return _text(status.mountpoint), status.volume or "", status.view


def _text(path: str) -> str:
    """A path as the format can have it; quotes, backslashes and newlines are its writer's."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
