"""`--strict`: a mount whose promises do not all hold in full is refused."""

import os
import time
from collections.abc import Callable
from typing import Final

from kmsfs.admin import control, security
from kmsfs.admin.status import MountStatus
from kmsfs.decryptor import wire
from kmsfs.errors import GuaranteeNotMet
from kmsfs.views.mountpoint import Mount

# A zygote has imported its libraries by then; without one there is no telling what it can do.
_ZYGOTE_S: Final = 15.0
_PAUSE_S: Final = 0.05


def require_all(mount: Mount, tell: Callable[[wire.PromiseWeak], None]) -> None:
    """Look at a mount that serves already; each promise below good is told.

    Raises:
        GuaranteeNotMet: there is one.
        ControlUnavailable: the daemon does not answer.
    """
    report = security.assess(_status_with_zygote(mount), mount.device)
    weak = [finding for finding in report.findings if finding.grade != "good"]
    for finding in weak:
        tell(
            wire.PromiseWeak(
                promise=finding.promise,
                grade=finding.grade,
                evidence=finding.evidence,
                todo=finding.todo,
            )
        )
    if weak:
        count = "1 promise does" if len(weak) == 1 else f"{len(weak)} promises do"
        raise GuaranteeNotMet(f"{count} not hold in full, and --strict asks for it")


def _status_with_zygote(mount: Mount) -> MountStatus:
    """The mount's status, once its zygote has said what it is, or has had the time to."""
    ends_at = time.monotonic() + _ZYGOTE_S
    while True:
        answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
        assert isinstance(answer, control.StatusAnswer)
        if answer.status.zygote_pid is not None or time.monotonic() > ends_at:
            return answer.status
        time.sleep(_PAUSE_S)
