"""What a command does before it touches plaintext."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kmsfs.cli import messages
from kmsfs.memory import process


def protect_process() -> None:
    """No core dump, no swap where it can be helped, and no half-written file at SIGTERM."""
    process.harden("kmsfs")
    if not process.lock_all_memory() and _has_swap():
        messages.warning("this process's memory cannot be locked: plaintext may reach swap")
        messages.hint("raise the locked-memory limit (ulimit -l, LimitMEMLOCK)")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> NoReturn:
    # Unwinds, and so removes what is half written.
    sys.exit(128 + number)


def _has_swap() -> bool:
    try:
        # One line of headings, one for each area.
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return True
