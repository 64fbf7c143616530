"""`python -m tests.fault.matrix`: run the matrix, write its table into contrib/docs/faults.md."""

import sys
from pathlib import Path

import pytest

from tests.fault.matrix.faults import GROUPS
from tests.fault.matrix.table import BEGIN, FAULTS_MD, Measured, render, times_of


class _Collector:
    """Takes what the tests measured out of their reports."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and report.passed:
            for name, value in report.user_properties:
                if name == Measured.__name__:
                    assert isinstance(value, dict)
                    self.measured.append(Measured(**value))


def main(arguments: list[str]) -> int:
    """Returns pytest's exit status; the table is written only if all passed."""
    collector = _Collector()
    here = str(Path(__file__).parent)
    status = int(pytest.main([here, "-q", "-k", "test_fault", *arguments], plugins=[collector]))
    if status == 0:
        text = FAULTS_MD.read_text()
        before, mark, _ = text.partition(BEGIN)
        assert mark, f"{FAULTS_MD} has no line {BEGIN}"
        table = render(GROUPS, times_of(collector.measured))
        FAULTS_MD.write_text(f"{before}{BEGIN}\n\n{table}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
