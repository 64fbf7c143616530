"""`kmsfs decrypt -r`: a tree of ciphertext to a tree of plaintext, in memory unless forced."""

import os
from pathlib import Path

from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.errors import GuaranteeNotMet, OutputUnwritable
from kmsfs.formats.detect import served_name
from kmsfs.manage.decrypt import decrypt_file
from kmsfs.manage.gate import Gate
from kmsfs.manage.input import absolute
from kmsfs.manage.keys import KeyOptions, KeyServices
from kmsfs.manage.output import check_output, make_directories, write_file
from kmsfs.manage.place import Volumes
from kmsfs.manage.plan import FilePlan
from kmsfs.manage.pool import Outcome, Work
from kmsfs.manage.tree import find_files, is_ciphertext
from kmsfs.views.ram_mount import is_swappable


def plan_decryption(directory: str, output: str, *, force: bool) -> FilePlan:
    """All files below a directory, each to its served path below `output`, which is made.

    Args:
        force: whether `output` may lie where plaintext can reach a disk.

    Raises:
        GuaranteeNotMet: plaintext could reach a disk there, or swap.
        InputUnreadable: a directory is missing or cannot be read.
        OutputUnwritable: the directory or the disk says no.
    """
    out = absolute(output)
    # The nearest directory that is there: those below it will lie where it does.
    there = next(place for place in (out, *out.parents) if place.is_dir())
    if not force:
        _check_memory(there, out)
    tree = find_files(Path(directory), without=out)
    make_directories(out)
    plan = FilePlan()
    for path in tree.files:
        parent, name = os.path.split(path)
        plan.jobs.append((os.path.join(directory, path), out / parent / served_name(name)[0]))
    plan.passed_over += [(os.path.join(directory, path), kind) for path, kind in tree.passed_over]
    return plan


def decrypt_work(plan: FilePlan, options: KeyOptions, gate: Gate, *, force: bool) -> Work:
    """What a worker does with each file of the plan. Plaintext goes from it to the output alone.

    Args:
        force: whether existing outputs are replaced.
    """
    services = KeyServices(gate)
    volumes = Volumes()
    in_memory: set[Path] = set()

    def work(number: int) -> Outcome:
        name, output = plan.jobs[number]
        if os.path.basename(name) == VOLUME_FILE_NAME:
            return Outcome("skipped", detail=VOLUME_FILE_NAME)
        if not is_ciphertext(name):
            return Outcome("skipped", detail="no ciphertext")
        make_directories(output.parent)
        # A link or another mount below the directory that was checked may lead elsewhere.
        if not force and output.parent not in in_memory:
            _check_memory(output.parent, output.parent)
            in_memory.add(output.parent)
        check_output(output, replace=force)
        with decrypt_file(name, None, options, volumes=volumes, services=services) as plaintext:
            write_file(output, plaintext.content, replace=force)
            warning = plaintext.warning
        hint = "name it under unbound in kmsfs.toml"
        return Outcome(
            "done",
            output=os.path.relpath(output),
            warnings=((warning, hint),) if warning else (),
        )

    return work


def _check_memory(directory: Path, shown: Path) -> None:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputUnwritable(f"{directory}: {error.strerror}") from error
    try:
        if is_swappable(fd):
            raise GuaranteeNotMet(
                f"{shown} lies neither on a ramfs nor on a tmpfs mounted with noswap",
                hint="mount a ramfs there, or add --force to put plaintext where it may reach a "
                "disk",
            )
    finally:
        os.close(fd)
