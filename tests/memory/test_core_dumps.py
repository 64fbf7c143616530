"""A process of kmsfs that crashes leaves no core: neither as a file nor with a crash handler."""

import os
import resource
import signal
from collections.abc import Iterator

import pytest

from tests.support import without_memfd_secret
from tests.support.canary import forms_of, secret
from tests.support.control_process import control_process
from tests.support.core_pattern import Cores, cores
from tests.support.mounts import MountedVolume, children_of, process_name, wait_gone, wait_until
from tests.support.sites import Site

WITH_CORES = ("prlimit", "--core=unlimited:unlimited")


@pytest.fixture(params=["file", "pipe"])
def taken(request: pytest.FixtureRequest, mountable: None) -> Iterator[Cores]:
    """Cores as files, and through a program."""
    with cores(request.param) as found:
        yield found


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_no_process_of_a_mount_leaves_a_core(
    taken: Cores, site: Site, own: str, number: signal.Signals
) -> None:
    site.make_volume()
    site.encrypt("key", site.secret(own, 20_000))
    # The daemon's memory then holds what a core could hold.
    volume = site.mount(prefix=(*WITH_CORES, *without_memfd_secret.PREFIX))
    assert (volume.path / "key").read_bytes()
    status = volume.status()
    # The launcher last: it starts the others anew.
    launcher = volume.launcher_pid
    crashed = [*volume.workers(), status["zygote_pid"], status["daemon_pid"], launcher]
    names = [process_name(pid) for pid in crashed]
    assert names == ["kmsfs-worker", "kmsfs-zygote", "kmsfs-daemon", "kmsfs-launcher"]
    for pid in crashed[:-1]:
        os.kill(pid, number)
        wait_gone(pid)
    wait_until(lambda: is_served(volume), "it is mounted anew")
    others = children_of(launcher)
    os.kill(launcher, number)
    # They end with it.
    for pid in (launcher, *others):
        wait_gone(pid)
    assert [name for name, pid in zip(names, crashed, strict=True) if taken.of(pid)] == []


def is_served(volume: MountedVolume) -> bool:
    """Whether a daemon answers."""
    try:
        return volume.path.joinpath("key").exists()
    except OSError:
        return False


def test_a_process_that_takes_no_care_leaves_a_core_with_what_it_held(
    taken: Cores, own: str
) -> None:
    with control_process("keep", given=secret(own, 20_000)) as pid:
        resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        os.kill(pid, signal.SIGABRT)
        wait_gone(pid)
    core = taken.of(pid)
    assert core is not None
    assert core.read_bytes().count(forms_of(own)["raw"]) > 0
