"""`python -m tests.benchmark [NAME...]`: print every ratio with its bound.

Names: first_read, protection, outage, start, memory, load, bulk; all without any.
"""

import importlib
import sys
import tempfile
from pathlib import Path

_ALL = ("first_read", "protection", "outage", "start", "memory", "load", "bulk")


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    for name in names or _ALL:
        module = importlib.import_module(f"tests.benchmark.{name}")
        with tempfile.TemporaryDirectory(prefix="kmsfs-benchmark-") as directory:
            for result in module.measure(Path(directory) / name):
                print(result, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
