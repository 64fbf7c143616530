"""No plaintext of kmsfs reaches a swap device, with every page pushed out that can be."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import without_memfd_secret
from tests.support.canary import forms_of, secret
from tests.support.control_process import control_process
from tests.support.machine import mounted_filesystem
from tests.support.mounts import MountedVolume, parent_of, processes_of, wait_until
from tests.support.sites import Site, StrictSite
from tests.support.swap import SwapFile, push_out, swap_file, swapped_kib

FILES = 20

# What a process of the interpreter has at least.
PUSHED_KIB = 1000

KINDS = pytest.mark.parametrize(
    "prefix", [(), without_memfd_secret.PREFIX], ids=["memfd_secret", "memfd"]
)


@pytest.fixture
def swap() -> Iterator[SwapFile]:
    """A swap file that is used from now on."""
    with swap_file() as file:
        yield file


class Reading(threading.Thread):
    """Reads files over and over until it is told to stop, and counts."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self.paths = paths
        self.reads = 0
        self.enough = threading.Event()

    def run(self) -> None:
        """One file after the other."""
        while not self.enough.is_set():
            for path in self.paths:
                assert path.read_bytes()
                self.reads += 1


@contextlib.contextmanager
def being_read(paths: list[Path]) -> Iterator[list[Reading]]:
    """Have each of four readers read all of the files."""
    readers = [Reading(paths[n:] + paths[:n]) for n in range(4)]
    for reader in readers:
        reader.start()
    try:
        yield readers
    finally:
        for reader in readers:
            reader.enough.set()
        for reader in readers:
            reader.join()


def push_out_mount(volume: MountedVolume) -> None:
    """Push out all processes of a mount."""
    status = volume.status()
    lasting = (parent_of(status["daemon_pid"]), status["daemon_pid"], status["zygote_pid"])
    swapped_kib = push_out(set(processes_of(volume.path)) | set(lasting))
    assert min(swapped_kib[pid] for pid in lasting) > PUSHED_KIB


def assert_swap_has_none(swap: SwapFile, label: str) -> None:
    """Nothing of a label's plaintexts is in swap, though it would be found there."""
    control = f"{label}/control"
    with control_process("keep", given=secret(control, 20_000)) as pid:
        wait_until(lambda: bool(push_out([pid])[pid]), "the control is pushed out")
        wait_until(lambda: "raw" in swap.count(forms_of(control)), "the control is in swap")
        assert swap.count(forms_of(f"{label}/served")) == {}


@KINDS
def test_nothing_is_swapped_while_files_are_decrypted_and_read(
    swap: SwapFile, strict_site: StrictSite, own: str, prefix: tuple[str, ...]
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("[cache]\nidle_s = 0.05\n")
    for number in range(FILES):
        site.encrypt(f"file-{number}", site.secret(f"{own}/served:{number}", 20_000))
    volume = site.mount(prefix=prefix)
    with being_read([volume.path / f"file-{number}" for number in range(FILES)]) as readers:
        wait_until(lambda: bool(volume.workers()), "files are decrypted")
        for _ in range(3):
            before = [reader.reads for reader in readers]
            push_out_mount(volume)
            assert sum(reader.reads for reader in readers) > sum(before)
    assert len(site.kms.calls("Decrypt")) > FILES
    assert_swap_has_none(swap, own)


@KINDS
def test_nothing_is_swapped_while_files_wait_for_their_reader(
    swap: SwapFile, site: Site, own: str, prefix: tuple[str, ...]
) -> None:
    site.make_volume()
    for number in range(FILES):
        site.encrypt(f"file-{number}", site.secret(f"{own}/served:{number}", 20_000))
    volume = site.mount(prefix=prefix)
    with contextlib.ExitStack() as opened:
        for number in range(FILES):
            file = opened.enter_context((volume.path / f"file-{number}").open("rb", buffering=0))
            assert len(file.read(100)) == 100
        push_out_mount(volume)
        assert_swap_has_none(swap, own)


def test_nothing_of_a_worker_is_swapped_that_has_decrypted_and_asks_kms_again(
    swap: SwapFile, strict_site: StrictSite, own: str
) -> None:
    site = strict_site
    for name in ("first", "second"):
        site.write(f"{name}.encrypted", site.blob(site.secret(f"{own}/served:{name}", 4000)))
    volume = site.mount()
    assert (volume.path / "first").read_bytes()
    (worker,) = volume.workers()
    site.key.latency_s = 1.0
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((volume.path / "second").read_bytes)
        wait_until(lambda: site.kms.waiting == 1, "the worker asks KMS")
        push_out_mount(volume)
        assert not reading.done()
        assert reading.result(10)
    assert volume.workers() == [worker]
    push_out_mount(volume)
    assert swapped_kib(worker) == 0
    assert_swap_has_none(swap, own)


def test_nothing_of_the_ramfs_view_is_swapped(swap: SwapFile, site: Site, own: str) -> None:
    site.make_volume()
    for number in range(FILES):
        site.encrypt(f"file-{number}", site.secret(f"{own}/served:{number}", 20_000))
    volume = site.mount("--view", "ramfs")
    with control_process("map", str(volume.path / "file-0")) as pid:
        push_out([pid])
        push_out_mount(volume)
        assert_swap_has_none(swap, own)


def test_nothing_is_swapped_while_a_ramfs_is_filled(
    swap: SwapFile, strict_site: StrictSite, own: str
) -> None:
    site = strict_site
    site.make_volume()
    for number in range(FILES):
        site.encrypt(f"file-{number}", site.secret(f"{own}/served:{number}", 20_000))
    # The last ones are still asked for while the first ones lie in the ramfs.
    site.key.latency_s = 0.5
    path = site.directory / "mnt"
    with ThreadPoolExecutor(1) as pool:
        mounting = pool.submit(site.mount, "--view", "ramfs", path=path)
        wait_until(lambda: len(site.kms.calls("Decrypt")) > FILES // 4, "it is being filled")
        swapped_kib = push_out(processes_of(path))
        assert not mounting.done()
        volume = mounting.result(20)
    assert max(swapped_kib.values()) > PUSHED_KIB
    push_out_mount(volume)
    assert_swap_has_none(swap, own)


def test_a_file_on_tmpfs_is_swapped_and_one_on_ramfs_is_not(
    swap: SwapFile, tmp_path: Path, own: str
) -> None:
    with contextlib.ExitStack() as stack:
        pids = []
        for fs_type in ("tmpfs", "ramfs"):
            place = stack.enter_context(mounted_filesystem(fs_type, tmp_path / fs_type))
            (place / "file").write_bytes(secret(f"{own}/{fs_type}", 20_000))
            pids.append(stack.enter_context(control_process("map", str(place / "file"))))
        push_out(pids)
        wait_until(lambda: "raw" in swap.count(forms_of(f"{own}/tmpfs")), "tmpfs is swapped")
        assert swap.count(forms_of(f"{own}/ramfs")) == {}
