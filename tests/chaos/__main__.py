"""`python -m tests.chaos --seconds 600 [--seed N] [--view fuse|ramfs]`: run, and say what came.

Ends with 1 when something was read, or went on, as it must not.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import run


def main(arguments: list[str]) -> int:
    """Run as the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--view", choices=("fuse", "ramfs"), default="fuse")
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kmsfs-chaos-") as directory:
        report = run(
            Path(directory) / "site", view=given.view, seed=given.seed, seconds=given.seconds
        )
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
