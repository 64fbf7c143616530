"""The README in parts: its blocks of code, with the headings they stand under."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TEXT = (ROOT / "README.md").read_text()

_FENCE = re.compile(r"```(\w*)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading above it, its language, its lines."""

    section: str
    language: str
    lines: tuple[str, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """What a user types, for a block of `console`: each line stands for itself."""
        return tuple(line.removeprefix("$ ") for line in self.lines)


def blocks(language: str) -> tuple[Block, ...]:
    """All blocks of a language, in their order."""
    return tuple(block for block in _blocks() if block.language == language)


def table(heading: str) -> tuple[tuple[str, ...], ...]:
    """The rows of the table under a heading, without its head."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return tuple(tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows[2:])


def _blocks() -> Iterator[Block]:
    section, language, lines = "", None, list[str]()
    for line in TEXT.splitlines():
        if (fence := _FENCE.fullmatch(line)) is None:
            if language is not None:
                lines.append(line)
            elif line.startswith("#"):
                section = line.lstrip("# ")
        elif language is None:
            language, lines = fence[1], []
        else:
            yield Block(section, language, tuple(lines))
            language = None
    assert language is None, "a block has no end"
