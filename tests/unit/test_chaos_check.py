"""The chaos run's checks can fail: each kind of wrong read is told from a right one."""

import errno
import os
from pathlib import Path

import pytest

from tests.chaos.check import Piece, WrongError, versions_of
from tests.chaos.content import LINE_BYTES, TINY_BYTES, Contents, content_of, size_of
from tests.chaos.errnos import Moment, is_allowed
from tests.chaos.reader import Reader, ReaderJob
from tests.chaos.table import Table, Window
from tests.support.canary import MARK, carries

SIZES = [TINY_BYTES, 300, 4096, 20_000]
WHOLE = 1 << 18
LARGE = 3


@pytest.fixture
def contents() -> Contents:
    return Contents(SIZES)


def kind_of(contents: Contents, piece: Piece, valid: range | frozenset[int]) -> str:
    """What kind of wrong read a piece is taken for; `right` if for none."""
    try:
        versions_of(contents, piece, valid)
    except WrongError as error:
        return "it repeats what it read" if carries(str(error)) else error.kind
    return "right"


def whole(index: int, data: bytes) -> Piece:
    return Piece(index, 0, WHOLE, data)


# --- content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_bytes", SIZES)
def test_versions_differ_and_are_marked_throughout(base_bytes: int) -> None:
    plaintexts = [content_of(7, version, base_bytes) for version in range(1, 10)]
    assert len(set(plaintexts)) == len(plaintexts)
    assert [len(plaintext) for plaintext in plaintexts] == [
        size_of(base_bytes, version) for version in range(1, 10)
    ]
    for plaintext in plaintexts:
        assert base_bytes == TINY_BYTES or plaintext.startswith(MARK.encode())
        for start in range(0, len(plaintext) - 2 * LINE_BYTES, 1000):
            assert b":007.00000" in plaintext[start : start + 2 * LINE_BYTES]


# --- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_a_valid_version_is_right_whole_and_in_pieces(contents: Contents, index: int) -> None:
    data = contents.of(index, 5)
    assert versions_of(contents, whole(index, data), range(4, 7)) == {5}
    for offset in (0, 1, len(data) // 2, len(data) - 1):
        piece = Piece(index, offset, 80, data[offset : offset + 80])
        assert 5 in versions_of(contents, piece, range(4, 7))


def test_what_lies_behind_the_end_is_empty(contents: Contents) -> None:
    assert kind_of(contents, Piece(1, 10_000, 80, b""), range(1, 3)) == "right"
    assert kind_of(contents, Piece(1, 10, 80, b""), range(1, 3)) == "cut"


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_a_version_before_or_after_the_valid_ones_is_reported(
    contents: Contents, index: int
) -> None:
    assert kind_of(contents, whole(index, contents.of(index, 3)), range(4, 7)) == "old"
    assert kind_of(contents, whole(index, contents.of(index, 7)), range(4, 7)) == "future"


@pytest.mark.parametrize("other", [0, 1, 2])
def test_another_files_content_is_reported(contents: Contents, other: int) -> None:
    assert kind_of(contents, whole(LARGE, contents.of(other, 5)), range(4, 7)) == "foreign"
    own = contents.of(LARGE, 5)
    mixed = own[:5000] + contents.of(other, 5)[:200] + own[5200:]
    assert kind_of(contents, whole(LARGE, mixed), range(4, 7)) == "foreign"


def test_a_mixture_of_two_versions_is_reported(contents: Contents) -> None:
    torn = contents.of(LARGE, 4)[:8192] + contents.of(LARGE, 5)[8192:]
    assert kind_of(contents, whole(LARGE, torn), range(4, 7)) == "torn"


def test_two_reads_of_one_descriptor_cannot_be_of_two_versions(contents: Contents) -> None:
    first = versions_of(contents, Piece(2, 0, 80, contents.of(2, 4)[:80]), range(4, 7))
    second = Piece(2, 80, 80, contents.of(2, 5)[80:160])
    assert kind_of(contents, second, first) == "future"


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_what_is_too_short_or_too_long_is_reported(contents: Contents, index: int) -> None:
    data = contents.of(index, 6)
    assert kind_of(contents, whole(index, b""), range(4, 7)) == "cut"
    assert kind_of(contents, whole(index, data + b"\0"), range(4, 7)) == "long"
    if SIZES[index] > TINY_BYTES:
        assert kind_of(contents, whole(index, data[:-1]), range(4, 7)) == "cut"


def test_zeros_and_single_other_bits_are_reported(contents: Contents) -> None:
    data = contents.of(LARGE, 6)
    assert kind_of(contents, whole(LARGE, bytes(len(data))), range(4, 7)) == "altered"
    assert kind_of(contents, whole(LARGE, data[:4096] + bytes(len(data) - 4096)), range(4, 7)) == (
        "altered"
    )
    for at in (0, 20, 9999, len(data) - 1):
        other = bytearray(data)
        other[at] ^= 0x80
        assert kind_of(contents, whole(LARGE, bytes(other)), range(4, 7)) != "right"


# --- windows and errors --------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table.create(tmp_path / "table", len(SIZES))


def test_a_window_is_seen_before_during_and_after(table: Table) -> None:
    window: Window = table.lock
    before = window.mark()
    assert not window.overlaps(before)
    window.begin()
    during = window.mark()
    assert window.overlaps(before)
    assert window.overlaps(during)
    window.end()
    assert window.overlaps(before)
    assert window.overlaps(during)
    assert not window.overlaps(window.mark())
    assert window.overlaps(window.mark(), grace_s=60.0)


def test_another_process_sees_what_is_written(table: Table, tmp_path: Path) -> None:
    table.files[2].newest = 9
    table.files[2].absent.begin()
    other = Table(tmp_path / "table")
    assert other.files[2].newest == 9
    assert other.files[2].floor == 0
    assert other.files[2].absent.overlaps(0)
    assert not other.stopping
    table.stop()
    assert other.stopping


def test_each_error_needs_its_cause(table: Table) -> None:
    moment = Moment.of(table, 1)

    def allowed(number: int, view: str = "fuse") -> bool:
        return is_allowed(number, moment, table, 1, view)

    for number in (errno.EBADMSG, errno.ENOENT, errno.ENOKEY, errno.EKEYREVOKED, errno.ENOTCONN):
        assert not allowed(number)
    assert allowed(errno.ETIMEDOUT)
    assert not allowed(errno.ENOTDIR)
    assert not allowed(errno.EBADMSG, "ramfs")
    assert allowed(errno.ENOENT, "ramfs")
    table.files[1].tampered.begin()
    assert allowed(errno.EBADMSG)
    table.lock.begin()
    assert allowed(errno.ENOKEY)
    table.daemon.begin()
    assert allowed(errno.ENOTCONN)
    table.kms.begin()
    assert allowed(errno.EKEYREVOKED)


def test_in_a_calm_there_is_no_error(table: Table) -> None:
    table.change_calm()
    moment = Moment.of(table, 1)
    assert not is_allowed(errno.ETIMEDOUT, moment, table, 1, "fuse")
    assert not is_allowed(errno.ENOENT, moment, table, 1, "ramfs")
    table.change_calm()
    assert is_allowed(errno.ETIMEDOUT, moment, table, 1, "fuse")


# --- the reader ----------------------------------------------------------------------------------


@pytest.fixture
def reader(table: Table, tmp_path: Path, contents: Contents) -> Reader:
    """A reader of ordinary files, of which version 3 is in place."""
    served = tmp_path / "served"
    served.mkdir()
    for index, row in enumerate(table.files):
        row.newest = row.floor = 3
        (served / f"file-{index}").write_bytes(contents.of(index, 3))
    names = [f"file-{index}" for index in range(len(SIZES))]
    job = ReaderJob(
        table=str(tmp_path / "table"),
        mountpoint=str(served),
        view="fuse",
        seed="test",
        open_within_s=10.0,
        names=names,
        base_sizes=SIZES,
        at_most=400,
    )
    return Reader(job)


def test_a_reader_finds_nothing_wrong_with_what_is_right(reader: Reader) -> None:
    tally = reader.run()
    assert tally.reads >= 400
    assert tally.successes == tally.reads
    assert (tally.wrong, tally.problems) == (0, [])


@pytest.mark.parametrize("wrong", ["old", "foreign", "cut", "torn"])
def test_a_reader_reports_one_file_that_is_wrong(
    reader: Reader, contents: Contents, tmp_path: Path, wrong: str
) -> None:
    right = contents.of(2, 3)
    (tmp_path / "served" / "file-2").write_bytes(
        {
            "old": contents.of(2, 2),
            "foreign": contents.of(3, 3)[: len(right)],
            "cut": right[:-100],
            "torn": right[:2000] + contents.of(2, 2)[2000:],
        }[wrong]
    )
    tally = reader.run()
    assert tally.wrong > 0
    assert tally.successes > 0
    assert any(f"{wrong}: file 2" in problem for problem in tally.problems)
    assert not carries("".join(tally.problems))


def test_a_reader_reports_an_error_without_a_cause(reader: Reader, tmp_path: Path) -> None:
    os.unlink(tmp_path / "served" / "file-1")
    tally = reader.run()
    assert tally.errors["ENOENT"] > 0
    assert tally.wrong == 0
    assert "errno: ENOENT of file 1, with nothing to cause it" in tally.problems
