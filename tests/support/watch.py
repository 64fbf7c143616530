"""The pytest plugin that watches for the canary and for what a test leaves behind."""

import contextlib
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kmsfs.errors import KmsfsError
from tests.support import canary, leftovers

_CAPTURES = ("capfd", "capfdbinary", "capsys", "capsysbinary")
_PHASES = {"Captured stdout": "stdout", "Captured stderr": "stderr", "Captured log": "log"}


def _plaintext_on(item: pytest.Item) -> frozenset[str]:
    return frozenset(
        stream for marker in item.iter_markers("plaintext_on") for stream in marker.args
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose output, log or error shows the mark, without repeating it."""
    report = yield
    allowed = _plaintext_on(item)
    leaks = set()
    for title, content in report.sections:
        # Those of earlier phases were looked at when they ended.
        if not title.endswith(call.when):
            continue
        stream = next((name for start, name in _PHASES.items() if title.startswith(start)), title)
        if stream not in allowed and canary.carries(content):
            leaks.add(stream)
    raised = call.excinfo.value if call.excinfo is not None else None
    # A test's own assertion shows what it compared; that test has failed already.
    if not isinstance(raised, AssertionError) and "error" not in allowed:
        leaks |= {"error" for error in _chain(raised) if canary.carries(str(error))}
    if leaks:
        report.sections = [(title, canary.redact(text)) for title, text in report.sections]
        text = canary.redact(report.longreprtext) + "\n" if report.longrepr else ""
        report.outcome = "failed"
        report.longrepr = f"{text}plaintext on {', '.join(sorted(leaks))}"
    return report


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.fixture(autouse=True)
def _watch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """What a test reads back itself, errors that are caught, and files, are looked at as well."""
    allowed = _plaintext_on(request.node)
    leaks: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for name in _CAPTURES:
            if name in request.fixturenames:
                _watch_capture(request.getfixturevalue(name), leaks, patch)
        _watch_errors(leaks, patch)
        yield
    leaks -= allowed
    if "files" not in allowed:
        leaks |= {str(path.relative_to(tmp_path)) for path in canary.leaking_files(tmp_path)}
    if leaks:
        pytest.fail(f"plaintext on {', '.join(sorted(leaks))}", pytrace=False)


def _watch_capture(capture: Any, leaks: set[str], patch: pytest.MonkeyPatch) -> None:
    read = capture.readouterr

    def readouterr() -> Any:
        found = read()
        leaks.update(
            stream for stream, text in (("stdout", found.out), ("stderr", found.err))
            if canary.carries(text)
        )  # fmt: skip
        return found

    patch.setattr(capture, "readouterr", readouterr)


def _watch_errors(leaks: set[str], patch: pytest.MonkeyPatch) -> None:
    make = KmsfsError.__init__

    def watched(self: KmsfsError, detail: str, *, hint: str | None = None) -> None:
        if canary.carries(detail) or canary.carries(hint or ""):
            leaks.add("error")
        make(self, detail, hint=hint)

    patch.setattr(KmsfsError, "__init__", watched)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unmount and kill what a test leaves behind, and fail it for that.

    Set up before all other fixtures of a test, so that theirs have cleaned up before.
    """
    before = leftovers.children()
    yield
    problems = leftovers.clean_up(before, tmp_path_factory.getbasetemp())
    if problems:
        pytest.fail("left behind: " + "; ".join(problems), pytrace=False)


def pytest_configure() -> None:
    """Adopt the orphans of tests; see `leftovers`. Have what they start heed an interrupt, which
    a shell has the programs ignore that it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError):
        leftovers.adopt_orphans()
