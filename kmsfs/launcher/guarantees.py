"""`--strict`: a mount whose promises do not all hold in full is refused."""

import os
from collections.abc import Callable

from kmsfs.admin import control, security
from kmsfs.decryptor import wire
from kmsfs.errors import GuaranteeNotMet
from kmsfs.views.mountpoint import Mount


def require_all(mount: Mount, tell: Callable[[wire.PromiseWeak], None]) -> None:
    """Look at a mount that serves already; each promise below good is told.

    Raises:
        GuaranteeNotMet: there is one.
        ControlUnavailable: the daemon does not answer.
    """
    answer = control.call(mount.device, os.geteuid(), control.StatusRequest())
    assert isinstance(answer, control.StatusAnswer)
    weak = [f for f in security.assess(answer.status, mount.device).findings if f.grade != "good"]
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
