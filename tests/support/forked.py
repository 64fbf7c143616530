"""Forked children of a test, for what cannot be undone in the test's own process."""

import os
import resource
import traceback
import warnings
from collections.abc import Callable

NOBODY = 65534


def start(call: Callable[[], bool]) -> int:
    """Fork a child that ends with status 0 if `call` is true; its pid. It never returns here."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads. Those that trio keeps for reuse are idle and hold nothing
        # that a child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = 0 if call() else 1
        except BaseException:  # noqa: BLE001 - nothing may get past _exit into the test run
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    """Exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def holds(call: Callable[[], bool]) -> bool:
    """Whether `call` is true in a forked child."""
    return wait(start(call)) == 0


def become_nobody() -> None:
    """In a child of root: give up every privilege, such as that of locking without limit."""
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)


def limit_locked_memory(limit_bytes: int) -> None:
    """In a child: have no more locked memory than this."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_bytes, limit_bytes))
    become_nobody()
