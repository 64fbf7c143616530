"""The canary is proven by tests that leak on purpose: each must fail, its twin must pass."""

import base64
import re
from pathlib import Path

import pytest

from tests.support import canary
from tests.support.commands import Finished

pytest_plugins = ["pytester"]

_CONFTEST = """
pytest_plugins = ["tests.support.watch"]

def pytest_configure(config):
    config.addinivalue_line("markers", "plaintext_on(*streams): where plaintext belongs")
"""

_TESTS = """
import base64, logging, os, sys
import pytest
from kmsfs.errors import CiphertextInvalid
from tests.support.canary import secret

PLAINTEXT = secret("leak", 64).decode()

def leak_on_stdout():
    print(PLAINTEXT)

def leak_on_stdout_in_base64():
    print(base64.b64encode(b"x" + PLAINTEXT.encode()).decode())

def leak_on_stdout_in_hex():
    print(PLAINTEXT.encode().hex().upper())

def leak_on_stdout_past_python():
    os.write(1, PLAINTEXT.encode())

def leak_on_stderr():
    print(PLAINTEXT, file=sys.stderr)

def leak_on_log():
    logging.getLogger("any").error("got %s", PLAINTEXT)

def leak_on_error():
    raise ValueError(PLAINTEXT)

def leak_on_error_as_its_cause():
    try:
        raise ValueError(PLAINTEXT)
    except ValueError as error:
        raise RuntimeError("something") from error

def leak_on_error_that_is_caught():
    with pytest.raises(CiphertextInvalid):
        raise CiphertextInvalid("bytes " + PLAINTEXT)

def leak_on_hint_that_is_caught():
    with pytest.raises(CiphertextInvalid):
        raise CiphertextInvalid("bytes", hint=PLAINTEXT)

STREAMS = {
    leak_on_stdout: "stdout",
    leak_on_stdout_in_base64: "stdout",
    leak_on_stdout_in_hex: "stdout",
    leak_on_stdout_past_python: "stdout",
    leak_on_stderr: "stderr",
    leak_on_log: "log",
    leak_on_error_that_is_caught: "error",
    leak_on_hint_that_is_caught: "error",
}

@pytest.mark.parametrize("leak", [*STREAMS, leak_on_error, leak_on_error_as_its_cause])
def test_bad(leak):
    leak()

@pytest.mark.parametrize(
    "leak",
    [pytest.param(leak, marks=pytest.mark.plaintext_on(name)) for leak, name in STREAMS.items()],
)
def test_good_where_it_belongs(leak):
    leak()

@pytest.mark.plaintext_on("stderr")
def test_bad_on_another_stream_than_allowed():
    print(PLAINTEXT)

def test_bad_what_the_test_reads_back_itself(capfd):
    print(PLAINTEXT)
    assert capfd.readouterr().out

def test_bad_file_of_ciphertext(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/key.pem.encrypted").write_text(PLAINTEXT)

def test_bad_temporary_file(tmp_path):
    (tmp_path / ".key.pem.x7").write_text(PLAINTEXT)

def test_good_file_of_plaintext(tmp_path):
    (tmp_path / "key.pem").write_text(PLAINTEXT)

def test_good_file_where_it_belongs(tmp_path):
    (tmp_path / "made.json").write_text("{}")

@pytest.fixture
def leaking_teardown():
    yield
    print(PLAINTEXT)

def test_bad_in_teardown(leaking_teardown):
    pass

def test_bad_already_by_itself():
    assert PLAINTEXT == ""
"""


@pytest.fixture
def outcomes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.RunResult:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest(_CONFTEST)
    pytester.makepyfile(_TESTS)
    return pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider", "-rA")


@pytest.mark.plaintext_on("stdout")
def test_every_leak_fails_its_test_and_plaintext_where_it_belongs_does_not(
    outcomes: pytest.RunResult,
) -> None:
    told = outcomes.outlines[outcomes.outlines.index(_summary(outcomes)) + 1 :]
    results = [line.split(" ")[:2] for line in told if "::" in line]
    names = {place.split("::")[1] for _, place in results}
    failed = {place.split("::")[1] for result, place in results if result != "PASSED"}
    assert failed == {name for name in names if name.startswith("test_bad")}
    assert len(failed) == 10 + 6
    assert len(names - failed) == 8 + 2


@pytest.mark.plaintext_on("stdout")
def test_report_of_a_leak_does_not_repeat_it(outcomes: pytest.RunResult) -> None:
    text = outcomes.stdout.str()
    report = text[text.index("= FAILURES =") : text.index("= PASSES =")]
    sections = re.split(r"\n_{3,} (test_.*?) _{3,}\n", report)
    reports = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert len(reports) == 10
    telling = {name for name, said in reports.items() if canary.carries(said)}
    # A failed assertion of a test's own shows what it compared.
    assert telling == {"test_bad_already_by_itself"}


def _summary(outcomes: pytest.RunResult) -> str:
    return next(line for line in outcomes.outlines if "short test summary info" in line)


@pytest.mark.parametrize("size_bytes", [0, 1, 40, 4096, 300_000])
def test_secret_has_its_size(size_bytes: int) -> None:
    assert len(canary.secret("a", size_bytes)) == size_bytes


def test_secrets_of_different_labels_differ() -> None:
    assert canary.secret("a", 64) != canary.secret("b", 64)


@pytest.mark.parametrize("before", range(7))
def test_mark_is_found_in_base64_at_every_alignment(before: int) -> None:
    text = base64.encodebytes(b"?" * before + canary.secret("a", 300))
    assert canary.carries(text)
    assert canary.carries(base64.b64encode(b"?" * before + canary.MARK.encode() + b"?" * 5))
    assert canary.carries(base64.urlsafe_b64encode(b"?" * before + canary.MARK.encode() + b"??"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_mark_is_found_in_wide_characters(encoding: str) -> None:
    assert canary.carries(canary.secret("a", 100).decode().encode(encoding))


def test_forms_of_a_label_are_those_of_all_that_begin_with_it_and_of_no_other() -> None:
    forms = canary.forms_of("one")
    assert forms["raw"] in canary.secret("one:1", 300)
    assert forms["base64 at 1"] in base64.b64encode(b"?" + canary.secret("one:1", 300))
    assert forms["raw"] not in canary.secret("two", 300)


def test_nothing_is_found_where_nothing_is() -> None:
    assert not canary.carries(base64.b64encode(bytes(range(256)) * 40))
    assert not canary.carries("kmsfs: error: the file is empty")


def test_output_of_a_command_is_checked_but_where_plaintext_belongs() -> None:
    streams = [("stdout", canary.secret("a", 64)), ("stderr", b"")]
    canary.check_streams(streams, ("stdout",))
    with pytest.raises(AssertionError, match="plaintext on stdout"):
        canary.check_streams(streams, ("stderr",))


def test_finished_command_shows_no_output_in_assertions() -> None:
    plaintext = canary.secret("a", 64)
    finished = Finished(("decrypt", "a"), 1, plaintext, plaintext.decode())
    assert not canary.carries(repr(finished))


def test_files_on_other_filesystems_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "link.encrypted").symlink_to("/proc/self/environ")
    (tmp_path / "gone.encrypted").symlink_to(tmp_path / "missing")
    assert list(canary.leaking_files(tmp_path)) == []
