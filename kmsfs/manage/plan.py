"""What a command over many files is going to do, known before it begins."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kmsfs.manage.input import absolute
from kmsfs.manage.tree import find_files


@dataclass(slots=True)
class FilePlan:
    """Files and where they go.

    Attributes:
        jobs: each input as the user would name it, and its output.
        passed_over: path and kind of what is neither file nor directory.
        named: inputs that the user named, and which were not merely found.
    """

    jobs: list[tuple[str, Path]] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    named: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The inputs."""
        return [name for name, _ in self.jobs]

    @property
    def outputs(self) -> list[Path]:
        """Where they go."""
        return [output for _, output in self.jobs]


def plan_in_place(names: Sequence[str]) -> FilePlan:
    """The files among `names`, and all files of the directories among them, each once.

    Raises:
        InputUnreadable: a directory cannot be read.
    """
    plan = FilePlan()
    taken: set[Path] = set()
    for name in names:
        found = [name]
        if os.path.isdir(name):
            tree = find_files(Path(name))
            found = [os.path.join(name, path) for path in tree.files]
            plan.passed_over += [
                (os.path.join(name, path), kind) for path, kind in tree.passed_over
            ]
        else:
            plan.named.add(name)
        for one in found:
            path = absolute(one)
            if path not in taken:
                taken.add(path)
                plan.jobs.append((one, path))
    return plan
