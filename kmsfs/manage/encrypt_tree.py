"""`kmsfs encrypt -r`: which files of a tree are encrypted, and where to."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.errors import InputUnreadable, UsageInvalid
from kmsfs.formats.detect import SUFFIXES
from kmsfs.manage.encrypt_file import EncryptOptions, encrypt_to
from kmsfs.manage.gate import Gate
from kmsfs.manage.input import STANDARD_INPUT, absolute
from kmsfs.manage.keys import KeyServices
from kmsfs.manage.output import make_directories
from kmsfs.manage.place import Volumes
from kmsfs.manage.plan import FilePlan
from kmsfs.manage.pool import Outcome, Work
from kmsfs.manage.tree import find_files, is_ciphertext

_SUFFIX: Final = SUFFIXES[0]


def plan_encryption(names: Sequence[str], output: str | None) -> FilePlan:
    """All files of the directories among `names`, and the files among them.

    Outputs lie beside their inputs; with `output`, a directory, at the same relative path below
    that as their inputs have below the directory that was named.

    Raises:
        UsageInvalid: standard input is among them; two inputs would have one output.
        InputUnreadable: a name or a directory is missing or cannot be read.
    """
    plan = FilePlan()
    out = None if output is None else absolute(output)
    for name in names:
        if name == STANDARD_INPUT:
            raise UsageInvalid("standard input is no directory", hint="leave -r out")
        if not os.path.isdir(name):
            if not os.path.exists(name):
                raise InputUnreadable(f"{name}: No such file or directory")
            beside = absolute(name) if out is None else out / os.path.basename(name)
            plan.jobs.append((name, beside.with_name(beside.name + _SUFFIX)))
            continue
        tree = find_files(Path(name), without=out)
        top = absolute(name) if out is None else out
        plan.jobs += [(os.path.join(name, path), top / (path + _SUFFIX)) for path in tree.files]
        plan.passed_over += [(os.path.join(name, path), kind) for path, kind in tree.passed_over]
    taken: dict[Path, str] = {}
    for name, target in plan.jobs:
        other = taken.setdefault(target, name)
        if other != name:
            raise UsageInvalid(f"{other} and {name} would both become {target}")
    return plan


def encrypt_work(plan: FilePlan, options: EncryptOptions, gate: Gate) -> Work:
    """What a worker does with each file of the plan. The plaintext stays in the worker.

    With `options.force` outputs are replaced; ciphertext is never encrypted once more.
    """
    services = KeyServices(gate)
    volumes = Volumes()

    def work(number: int) -> Outcome:
        name, output = plan.jobs[number]
        if os.path.basename(name) == VOLUME_FILE_NAME:
            return Outcome("skipped", detail=VOLUME_FILE_NAME)
        if is_ciphertext(name):
            return Outcome("skipped", detail="ciphertext")
        if not options.force and os.path.isfile(output) and is_ciphertext(output):
            return Outcome("skipped", detail="encrypted before", warnings=_if_newer(name, output))
        make_directories(output.parent)
        done = encrypt_to(
            name, output, volumes.above(output.parent), replace(options, output=None), services
        )
        return Outcome("done", output=os.path.relpath(output), warnings=done.warnings)

    return work


def _if_newer(name: str, output: Path) -> tuple[tuple[str, str], ...]:
    if os.stat(name).st_mtime_ns <= os.stat(output).st_mtime_ns:
        return ()
    warning = f"it is newer than {os.path.relpath(output)}, which is left as it is"
    return ((warning, "add --force to encrypt again"),)
