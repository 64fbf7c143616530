"""Every fault in every view: the answer, in bounded time; the rest unharmed; mended, it serves."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmsfs.error_codes import from_code
from tests.fault.matrix.fault import Fault, Shown, Spared
from tests.fault.matrix.faults import GROUPS
from tests.fault.matrix.stage import DEADLINE_S, Scene, Stage, open_and_read, scene_on, set_up
from tests.fault.matrix.table import Measured
from tests.support.canary import secret
from tests.support.mounts import wait_until
from tests.support.requirements import require_mount

# More than these is a hang or a queue, not a slow machine.
_ANSWERED_S = DEADLINE_S + 6.0
_SPARED_S = 5.0

CASES = [
    pytest.param(fault, view, id=f"{fault.name}-{view}")
    for group in GROUPS
    for fault in group.faults
    for view in fault.views
]


class Stages:
    """The stages that faults share. One on which something went wrong is not used again."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._by_view: dict[str, tuple[Stage, contextlib.ExitStack]] = {}

    def of(self, view: str) -> Stage:
        """A stage with nothing the matter."""
        if view not in self._by_view:
            own = self._stack.enter_context(contextlib.ExitStack())
            self._by_view[view] = own.enter_context(set_up(view)), own
        return self._by_view[view][0]

    def drop(self, view: str) -> None:
        """Have the next fault of a view begin with a new one."""
        _, own = self._by_view.pop(view)
        own.close()


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """Made when they are first needed."""
    require_mount()
    with contextlib.ExitStack() as stack:
        yield Stages(stack)


@pytest.fixture
def scene(fault: Fault, view: str, stages: Stages) -> Iterator[Scene]:
    """A file that is served, to be struck by the fault."""
    with contextlib.ExitStack() as stack:
        if fault.stalling:
            stage = stack.enter_context(set_up(view, stalling=True))
        else:
            stage = stages.of(view)
            stack.push(lambda kind, *_: stages.drop(view) if kind is not None else None)
        with scene_on(stage, unbound=fault.unbound) as scene:
            yield scene
        stage.assert_nothing_leaked()


class Others:
    """What a fault must leave alone, looked at while it lasts and afterwards."""

    def __init__(self, scene: Scene) -> None:
        self._stage = scene.stage
        directory = scene.path.partition("/")[0]
        # Of another key; one is in memory and open, the other was never opened.
        self._names = (f"{directory}/known", f"{directory}/new")
        self._contents = tuple(secret(name, 5000) for name in self._names)
        for name, content in zip(self._names, self._contents, strict=True):
            self._stage.site.encrypt(name, content, key_arn=self._stage.other_key.arn)
        known, new = (self._stage.volume.path / name for name in self._names)
        wait_until(lambda: known.exists() and new.exists(), "the other files are there")
        assert known.read_bytes() == self._contents[0]
        self._held_fd = os.open(known, os.O_RDONLY)
        scene.ends.callback(os.close, self._held_fd)

    def check(self, spared: Spared) -> None:
        """While the fault lasts."""
        if spared is Spared.NOTHING:
            return
        assert os.pread(self._held_fd, 8192, 0) == self._contents[0]
        self._check_read(0)
        if spared is Spared.EVERYTHING:
            self._check_read(1)

    def check_again(self) -> None:
        """Once it has ended."""
        self._check_read(0)
        self._check_read(1)

    def _check_read(self, number: int) -> None:
        opened = open_and_read(self._stage.volume.path / self._names[number])
        assert (self._names[number], opened.error) == (self._names[number], "")
        assert opened.content == self._contents[number]
        assert opened.seconds < _SPARED_S


def meet_in_fuse(fault: Fault, scene: Scene) -> float:
    """Open what the fault struck; returns how long that took, in seconds."""
    opened = open_and_read(scene.served)
    assert opened.error == fault.errno
    if fault.reason is not None:
        assert is_reason(scene.reason(), fault.reason)
    assert opened.content == (b"" if fault.errno else scene.newest)
    return opened.seconds


def meet_in_ramfs(fault: Fault, scene: Scene) -> float:
    """Wait until the ramfs has dealt with what the fault struck; returns how long that took."""
    started = time.monotonic()
    if fault.ramfs is Shown.SERVED:
        return scene.recovered_after_s()
    if fault.ramfs is Shown.KEPT:
        if (reason := fault.reason) is not None:
            wait_until(lambda: is_reason(scene.reason(), reason), "it is held back")
        assert open_and_read(scene.served).content == scene.old
    else:
        wait_until(lambda: open_and_read(scene.served).error == "ENOENT", "it is taken away")
        assert fault.reason is not None
        assert is_reason(scene.reason(), RAMFS_REASONS.get(fault.reason, fault.reason))
    return time.monotonic() - started


def is_reason(found: str, expected: str) -> bool:
    """Whether an error is the expected one or, as DeadlineExceeded is KmsUnreachable, one of it."""
    if not found or not expected:
        return found == expected
    return issubclass(type(from_code(found, "")), type(from_code(expected, "")))


# The budget is one of files there.
RAMFS_REASONS = {"LockedMemoryExhausted": "RamLimitReached"}


@pytest.mark.parametrize(("fault", "view"), CASES)
def test_fault(
    fault: Fault, view: str, scene: Scene, record_property: Callable[[str, object], None]
) -> None:
    others = Others(scene)
    good = scene.next_version(fault.size_bytes)
    fault.strike(scene)
    altered = fault.alter(scene, good)
    with scene.striking():
        fault.put(scene, altered)
        answered_s = (meet_in_fuse if view == "fuse" else meet_in_ramfs)(fault, scene)
    assert answered_s < _ANSWERED_S
    others.check(spared_in(view, fault))
    fault.mend(scene)
    if fault.good_is_to_be_put:
        remove(scene.ciphertext)
        scene.put(good)
    recovered_s = scene.recovered_after_s()
    others.check_again()
    assert scene.reason() == ""
    row = Measured(fault.name, view, answered_s, recovered_s)
    record_property(Measured.__name__, dataclasses.asdict(row))


def spared_in(view: str, fault: Fault) -> Spared:
    """Files of a ramfs need nobody to be read, but for the lock."""
    return Spared.EVERYTHING if view == "ramfs" and fault.errno != "ENOKEY" else fault.spared


def remove(path: Path) -> None:
    """Take away whatever lies in the ciphertext's place."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
