"""What a command over many files is going to do, known before it begins."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class FilePlan:
    """Files and where they go.

    Attributes:
        jobs: each input as the user would name it, and its output.
        passed_over: path and kind of what is neither file nor directory.
    """

    jobs: list[tuple[str, Path]] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The inputs."""
        return [name for name, _ in self.jobs]
