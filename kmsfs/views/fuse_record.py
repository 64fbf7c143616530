"""What is recorded of an open, before its program has the descriptor."""

import trio

from kmsfs.errors import AuditFailed
from kmsfs.events import Opened
from kmsfs.store.volume import OpenedFile, Volume
from kmsfs.views.serving import Auditor


def opened_by(opened: OpenedFile, volume: Volume, *, uid: int, gid: int, pid: int) -> Opened:
    """The event of an open by a program."""
    path = opened.file.path
    success = volume.history.success_of(opened.file)
    return Opened(
        path=path,
        uid=uid,
        gid=gid,
        pid=pid,
        from_cache=opened.from_cache,
        stale=opened.from_cache and volume.cache.is_stale(path),
        age_s=0.0 if success is None else round(success.age_s, 3),
    )


async def record_open(
    event: Opened, opened: OpenedFile, audit: Auditor | None, deadline: float
) -> None:
    """Have an open recorded; its lease is closed where it is not.

    Args:
        deadline: on trio's clock.

    Raises:
        AuditFailed: it has to be recorded, and cannot be, or not in time.
    """
    if audit is None:
        return
    try:
        with trio.fail_at(deadline):
            await audit.admit(event)
    except trio.TooSlowError:
        opened.lease.close()
        raise AuditFailed("the open was not recorded within its deadline") from None
    except BaseException:
        opened.lease.close()
        raise
