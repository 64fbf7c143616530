"""The table of faults, answers and measured times in contrib/docs/faults.md."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fault.matrix.fault import Fault, Group, Shown

FAULTS_MD = Path(__file__).parents[3] / "contrib/docs/faults.md"

BEGIN = "<!-- made by python -m tests.fault.matrix -->"

_TIME = re.compile(r"(?<=\| )(?:\d+(?:\.\d+)? m?s|-)(?= \|)")

_HEAD = (
    "| fault | FUSE: the open | after | served again | ramfs: the file is | after | served again |"
    " meanwhile served (FUSE) |\n"
    "|---|---|--:|--:|---|--:|--:|---|\n"
)


@dataclass(frozen=True)
class Measured:
    """What one run of a fault in one view took, in seconds.

    Attributes:
        answered_s: until the open failed; in a ramfs, until it showed what it was to show.
        recovered_s: from the end of the fault until the new version was served.
    """

    fault: str
    view: str
    answered_s: float
    recovered_s: float


Times = Mapping[tuple[str, str], Measured]


def times_of(measured: Iterable[Measured]) -> Times:
    """By fault and view."""
    return {(one.fault, one.view): one for one in measured}


def render(groups: Iterable[Group], times: Times) -> str:
    """The tables in Markdown; a time that is not there is a dash."""
    return "\n".join(
        f"## {group.title}\n\n{_HEAD}" + "".join(_row(fault, times) for fault in group.faults)
        for group in groups
    )


def without_times(text: str) -> str:
    """The text with a dash for each time."""
    return _TIME.sub("-", text)


def _row(fault: Fault, times: Times) -> str:
    cells = [fault.name, _said(fault), *_cells(fault, "fuse", times)]
    cells += [_shown(fault), *_cells(fault, "ramfs", times), fault.spared.value]
    return f"| {' | '.join(cells)} |\n"


def _said(fault: Fault) -> str:
    if not fault.errno:
        return "is served"
    reason = f", {fault.reason}" if fault.reason else ""
    return f"{fault.errno}{reason}"


def _shown(fault: Fault) -> str:
    return {
        Shown.KEPT: "kept as it was",
        Shown.ABSENT: "taken away",
        Shown.SERVED: "replaced",
    }[fault.ramfs]


def _cells(fault: Fault, view: str, times: Times) -> list[str]:
    found = times.get((fault.name, view))
    return ["-", "-"] if found is None else [_time(found.answered_s), _time(found.recovered_s)]


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.0995 else f"{seconds:.1f} s"
