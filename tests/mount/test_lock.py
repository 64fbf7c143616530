"""`kmsfs lock`: nothing is served, nothing is held, and nobody who could hold a copy lives."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import children_of, process_name, wait_until
from tests.support.sites import Site, StrictSite

_MAPPER = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
file = open(sys.argv[1], "rb")
view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
start = ctypes.addressof(ctypes.c_char.from_buffer(view))
def resident():
    pages = (ctypes.c_ubyte * (-(-len(view) // mmap.PAGESIZE)))()
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(view)), pages) == 0
    return sum(page & 1 for page in pages)
first = view[0]
print("mapped", resident(), flush=True)
sys.stdin.readline()
print("left", resident(), flush=True)
print(view[len(view) - 1], view[0])
"""


def test_files_open_at_lock_stay_dead_after_unlock(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 500))
    volume = site.mount()
    with (volume.path / "key").open("rb", buffering=0) as opened:
        assert len(opened.read(100)) == 100
        volume.kmsfs("lock", volume.path)
        assert (volume.path / "key").stat().st_size == 500
        with pytest.raises(OSError, match="Required key not available"):
            opened.read(100)
        volume.kmsfs("unlock", volume.path)
        with pytest.raises(OSError, match="Required key not available"):
            opened.read(100)
    assert len((volume.path / "key").read_bytes()) == 500


def test_lock_ends_every_process_that_decrypted_or_holds_credentials(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 500))
    volume = site.mount()
    launcher_pid = volume.launcher_pid
    (volume.path / "key").read_bytes()
    before = {pid: process_name(pid) for pid in children_of(launcher_pid)}
    assert sorted(before.values()) == ["kmsfs-daemon", "kmsfs-worker", "kmsfs-zygote"]
    volume.kmsfs("lock", volume.path)
    for pid, name in before.items():
        assert has_memory(pid) == (name == "kmsfs-daemon")
    wait_until(
        lambda: [process_name(pid) for pid in children_of(launcher_pid)] == ["kmsfs-daemon"],
        "the launcher has reaped the zygote",
    )


def test_a_program_with_a_live_map_gets_sigbus_and_no_page_is_left(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 50_000))
    volume = site.mount()
    mapper = subprocess.Popen(
        [sys.executable, "-c", _MAPPER, str(volume.path / "key")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert mapper.stdin is not None
    assert mapper.stdout is not None
    said, touched = mapper.stdout.readline().split()
    assert (said, int(touched) >= 1) == ("mapped", True)
    volume.kmsfs("lock", volume.path)
    output, _ = mapper.communicate("go\n", timeout=20)
    assert mapper.returncode == -signal.SIGBUS
    assert output == "left 0\n"


def test_locked_memory_returns_to_where_it_began(site: Site) -> None:
    site.make_volume()
    for index in range(10):
        site.encrypt(f"key-{index}", site.secret(f"key {index}", 20_000))
    volume = site.mount()
    daemon_pid = volume.status()["daemon_pid"]
    before = locked_bytes(daemon_pid)
    for index in range(10):
        (volume.path / f"key-{index}").read_bytes()
    assert locked_bytes(daemon_pid) >= before + 10 * 20_000
    volume.kmsfs("lock", volume.path)
    assert locked_bytes(daemon_pid) == before


def test_an_open_waiting_for_kms_fails_at_once_when_locked(strict_site: StrictSite) -> None:
    site = strict_site
    site.write("slow.encrypted", site.blob(site.secret("slow", 40)))
    site.key.latency_s = 3.0
    volume = site.mount()
    reader = subprocess.Popen(
        ["cat", volume.path / "slow"],
        env={"LC_ALL": "C"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: bool(volume.status()["worker_pids"]), "a worker asks KMS")
    volume.kmsfs("lock", volume.path)
    _, error = reader.communicate(timeout=2)
    assert error.strip().endswith("Required key not available")


def has_memory(pid: int) -> bool:
    """Whether a process lives; one that is ending or unreaped has no memory any more."""
    try:
        return "VmRSS:" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def locked_bytes(pid: int) -> int:
    """VmLck of a process."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmLck:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no VmLck line")
