"""The rules of the house: imports go down, types hold, style is one, modules stay small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

MAX_LINES = 400

MODULES = sorted((ROOT / "kmsfs").rglob("*.py"))


def run(*argv: str) -> None:
    done = subprocess.run(
        [BIN / argv[0], *argv[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_go_down_only() -> None:
    run("lint-imports")


def test_types_hold() -> None:
    run("mypy")


def test_code_is_clean() -> None:
    run("ruff", "check", ".")


def test_code_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_small(module: Path) -> None:
    lines = len(module.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: a module of more than {MAX_LINES} wants to be two"


def test_modules_are_found() -> None:
    assert ROOT / "kmsfs" / "errors.py" in MODULES
