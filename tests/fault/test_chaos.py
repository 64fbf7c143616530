"""Readers, rotations, kills and outages at random: no read is wrong, and everything recovers.

The long run is `python -m tests.chaos`; this one is a few rounds of it.
"""

import random
from pathlib import Path

import pytest

from tests.chaos.run import run

_READS = {"fuse": 2000, "ramfs": 20_000}


@pytest.mark.parametrize(("view", "seconds"), [("fuse", 20.0), ("ramfs", 10.0)])
def test_no_read_gives_another_files_bytes_or_those_of_no_valid_version(
    mountable: None, tmp_path: Path, view: str, seconds: float
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    report = run(tmp_path / "site", view=view, seed=seed, seconds=seconds)
    print(report)
    assert report.problems == [], f"seed {seed}"
    # Else it says nothing: machines differ, but not so much.
    assert report.tally.successes > _READS[view]
    assert report.done["rotations"] > 0
