"""The threat model names tests that there are."""

import re

import pytest

from tests.support import readme

TEXT = (readme.ROOT / "contrib/docs/threat-model.md").read_text()

NAMED = sorted(set(re.findall(r"`((?:\w+/)+test_\w+\.py)(?:::(test_\w+))?`", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_is_named_is_there(file: str, test: str) -> None:
    text = (readme.ROOT / "tests" / file).read_text()
    assert not test or f"def {test}(" in text


def test_every_row_names_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what |")]
    assert len(rows) >= 15
    for row in rows:
        assert ".py" in row.rsplit("|", 2)[1], row
