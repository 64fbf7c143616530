"""The table in contrib/docs/faults.md is that of the matrix as it is."""

from tests.fault.matrix.faults import GROUPS
from tests.fault.matrix.table import BEGIN, FAULTS_MD, Measured, render, times_of, without_times


def test_the_documented_faults_and_answers_are_those_that_are_tested() -> None:
    documented = FAULTS_MD.read_text().partition(BEGIN)[2]
    assert without_times(documented).strip() == without_times(render(GROUPS, {})).strip()


def test_each_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for group in GROUPS for fault in group.faults]
    assert len(set(names)) == len(names)


def test_times_show_where_they_were_measured() -> None:
    fault = GROUPS[0].faults[0]
    times = times_of([Measured(fault.name, "fuse", 2.04, 0.004)])
    row = next(line for line in render(GROUPS, times).splitlines() if fault.name in line)
    assert "| 2.0 s | 4 ms |" in row
    assert row.count("| - | - |") == 1
    assert without_times(row).count("-") == 4
