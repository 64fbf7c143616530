"""Tells a right read from a wrong one, and says what is wrong with it without repeating it."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.chaos.content import LINE_BYTES, MARK, Contents


@dataclass(frozen=True)
class Piece:
    """What one read gave.

    Attributes:
        index: of the file that was read.
        offset: where it was read from.
        asked_bytes: how much was asked for; fewer mean that the file ends there.
        data: what came.
    """

    index: int
    offset: int
    asked_bytes: int
    data: bytes


class WrongError(Exception):
    """A read that gave something else than one of the valid versions; no plaintext in its text.

    Attributes:
        kind: one word: `foreign`, `torn`, `old`, `future`, `cut`, `long` or `altered`.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def versions_of(contents: Contents, piece: Piece, valid: range | frozenset[int]) -> frozenset[int]:
    """Of which of the valid versions a piece can be: of one, or of some if it is short.

    Raises:
        WrongError: of none of them.
    """
    hint = _hinted(piece)
    # Making a plaintext takes longer than reading it: the version that the piece names is tried
    # first, and the only one where it has to name one.
    if hint is not None:
        candidates: Iterable[int] = (hint,) if hint in valid else ()
    else:
        candidates = valid
    found = frozenset(v for v in candidates if piece.data == _expected(contents, piece, v))
    if not found:
        raise _explained(contents, piece, valid)
    return found


def _expected(contents: Contents, piece: Piece, version: int) -> bytes:
    return contents.of(piece.index, version)[piece.offset : piece.offset + piece.asked_bytes]


def _hinted(piece: Piece) -> int | None:
    match = MARK.search(piece.data, 0, 2 * LINE_BYTES)
    return None if match is None else int(match[2])


def _explained(contents: Contents, piece: Piece, valid: range | frozenset[int]) -> WrongError:
    """What is wrong with a piece."""
    data = piece.data
    marks = {(int(match[1]), int(match[2])) for match in MARK.finditer(data)}
    where = (
        f"file {piece.index}, {len(data)} of {piece.asked_bytes} bytes at {piece.offset}, valid "
        f"are versions {_in_words(valid)}, marked are {sorted(marks) or 'none'}"
    )
    foreign = sorted({index for index, _ in marks if index != piece.index})
    versions = sorted({version for index, version in marks if index == piece.index})
    if foreign:
        return WrongError("foreign", where)
    if len(versions) > 1:
        return WrongError("torn", where)
    if not versions:
        # Zeros, or too short to carry a mark.
        kind = "cut" if not data else "altered"
        return WrongError(kind, where)
    expected = _expected(contents, piece, versions[0])
    if data != expected:
        if expected.startswith(data):
            return WrongError("cut", f"{where}; {len(expected)} bytes were due")
        if data.startswith(expected):
            return WrongError("long", f"{where}; {len(expected)} bytes were due")
        first = next(at for at, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b)
        zeros = " by zeros" if not any(data[first:]) else ""
        return WrongError("altered", f"{where}; differs from its byte {first} on{zeros}")
    return WrongError("old" if versions[0] < min(valid, default=0) else "future", where)


def _in_words(valid: range | frozenset[int]) -> str:
    if isinstance(valid, range):
        return f"{valid.start} to {valid.stop - 1}"
    return ", ".join(map(str, sorted(valid)))
