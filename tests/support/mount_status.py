"""The status of a mount that there is not."""

from kmsfs.admin.status import MountStatus, NamedProblem
from kmsfs.memory.process import ProcessReport

STATUS = MountStatus(
    mountpoint="/m",
    source="/s",
    volume=None,
    view="fuse",
    locked=False,
    served=1,
    ignored_count=0,
    ignored=(),
    unbound_count=0,
    unbound=(),
    failing_count=1,
    failing=(NamedProblem(path="a", reason="no"),),
    stale_count=0,
    cached_count=0,
    cached=(),
    cached_bytes=0,
    budget_bytes=1,
    key_ids=(),
    credential_source=None,
    daemon_pid=1,
    zygote_pid=None,
    worker_pids=(),
    daemon=ProcessReport(
        undumpable=True, core_limit_zero=True, memory_locked=False, allocator_scrubs=False
    ),
    workers=None,
    plaintext_in=(),
    weaknesses=(),
)
