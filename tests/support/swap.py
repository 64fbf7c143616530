"""A real swap file, pages of chosen processes pushed out to it, and a look at what it holds."""

import contextlib
import ctypes
import mmap
import os
import select
import shlex
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.machine import RefusedError, changed, exclusive, kernel_setting
from tests.support.memory_scan import positions, ranges_of

# What the processes of one mount and the controls have, several times over.
_SIZE_BYTES = 128 << 20
_BLOCK_BYTES = 256 << 10
_UNUSED = bytes(_BLOCK_BYTES)

# The highest there is: used before any swap that the machine has.
_PRIORITY = 32767

# Compressed copies in memory in place of the file would hide what is in them.
_ZSWAP = Path("/sys/module/zswap/parameters/enabled")

_SYS_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21

# Pages that were touched just now go in a later pass.
_PASS_PAUSE_MS = 50
_MOST_PASSES = 12
_LEAST_PASSES = 3

_WRITTEN_MS = 2000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True)
class SwapFile:
    """The swap file in use."""

    path: Path

    def count(self, forms: Mapping[str, bytes]) -> Counter[str]:
        """How often each of some byte strings lies in the file, by its name.

        Everything that has been pushed out is written before. One that crosses the end of a
        page is not found: pages lie in no order.
        """
        _wait_for_writeback()
        found: Counter[str] = Counter()
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            # Anonymous maps begin at a page.
            with mmap.mmap(-1, _BLOCK_BYTES) as block:
                while (length := os.readv(fd, [block])) > 0:
                    data = block[:length]
                    if data == _UNUSED:
                        continue
                    for name, form in forms.items():
                        found[name] += sum(1 for _ in positions(data, form))
        finally:
            os.close(fd)
        return +found


def require_swap() -> None:
    """Skip the running test where it is not root."""
    if os.geteuid() != 0:
        _missing("not root")


def _missing(reason: str, *, expected: bool = True) -> None:
    if expected and os.environ.get("KMSFS_REQUIRE_MOUNT") == "1":
        pytest.fail(f"swap tests are required here, but {reason}", pytrace=False)
    pytest.skip(f"NO SWAP TESTS ON THIS MACHINE: {reason}")


@contextlib.contextmanager
def swap_file(parent: Path = Path("/var/tmp")) -> Iterator[SwapFile]:
    """Swap to a new file that holds nothing else; off and gone in the end in every case.

    The test is skipped where the machine has no such thing, as in most containers, and fails
    where KMSFS_REQUIRE_MOUNT=1 and the filesystem could hold it.
    """
    require_swap()
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive("swap"))
        directory = Path(tempfile.mkdtemp(prefix="kmsfs-swap-", dir=parent))
        path = directory / "swap"
        quoted = shlex.quote(str(path))
        try:
            _write_zeros(path)
            stack.enter_context(
                changed(
                    f"mkswap -q {quoted} >&2 && swapon -p {_PRIORITY} {quoted}",
                    f"swapoff {quoted} && rm -r {shlex.quote(str(directory))}",
                )
            )
        except (RefusedError, OSError) as error:
            path.unlink(missing_ok=True)
            directory.rmdir()
            expected = _filesystem_of(parent) in ("ext4", "xfs")
            _missing(f"{path} cannot be swapped to: {error}", expected=expected)
        if _ZSWAP.exists() and _ZSWAP.read_text().strip() == "Y":
            stack.enter_context(kernel_setting(_ZSWAP, "N"))
        yield SwapFile(path)


def _write_zeros(path: Path) -> None:
    """Blocks that are only reserved cannot be swapped to, nor found to be empty."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(0, _SIZE_BYTES, _BLOCK_BYTES):
            os.write(fd, _UNUSED)
        os.fsync(fd)
    finally:
        os.close(fd)


def _filesystem_of(path: Path) -> str:
    """Its type, from the mount table."""
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, fs_type, *_ = line.split()
        if path.is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, fs_type)
    return best[1]


def push_out(pids: Collection[int]) -> dict[int, int]:
    """Have the kernel write every page of some processes to swap that it can write there.

    Passes are made until nothing more goes. Pages that several processes share stay.

    Returns: KiB of private memory in swap, the most seen of each process.
    """
    most = dict.fromkeys(pids, 0)
    idle = 0
    pause = select.poll()
    for number in range(_MOST_PASSES):
        if number:
            pause.poll(_PASS_PAUSE_MS)
        _empty_batches()
        grew = False
        for pid in pids:
            push_out_once(pid)
            swapped = swapped_kib(pid)
            grew = grew or swapped > most[pid]
            most[pid] = max(most[pid], swapped)
        idle = 0 if grew else idle + 1
        if number >= _LEAST_PASSES and idle >= 2:
            break
    return most


def push_out_once(pid: int) -> None:
    """One pass over all mappings of a process; none where it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for found in ranges_of(pid):
            # Locked memory and that of devices is refused: EINVAL.
            vector = _IoVec(found.start, found.end - found.start)
            _libc.syscall(
                _SYS_PROCESS_MADVISE,
                ctypes.c_int(pidfd),
                ctypes.byref(vector),
                ctypes.c_size_t(1),
                ctypes.c_int(_MADV_PAGEOUT),
                ctypes.c_uint(0),
            )
    finally:
        os.close(pidfd)


def _empty_batches() -> None:
    """Have the kernel take the pages that were used last out of each CPU's batch.

    In there they cannot be pushed out. It does so when it is to forget a page of a file and cannot,
    as somebody has it mapped.
    """
    fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, 1, prot=mmap.PROT_READ) as mapped:
            assert mapped[0]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def swapped_kib(pid: int) -> int:
    """VmSwap: private memory of a process that is in swap; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmSwap:"):
                return int(line.split()[1])
    return 0


def _wait_for_writeback() -> None:
    """Wait until no page of the machine is on its way to a disk, or for some time."""
    pause = select.poll()
    for _ in range(0, _WRITTEN_MS, 5):
        counters = Path("/proc/vmstat").read_text()
        if "\nnr_writeback 0\n" in counters:
            return
        pause.poll(5)
