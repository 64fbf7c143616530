"""No process of kmsfs holds plaintext longer than it has to: their memory is read from outside."""

import base64
import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import memory_scan, without_memfd_secret
from tests.support.canary import forms_of, secret
from tests.support.control_process import control_process
from tests.support.memory_scan import Scan, ranges_of, scan
from tests.support.mounts import MountedVolume, parent_of, processes_of, wait_until
from tests.support.process_facts import locked_kib
from tests.support.sites import Site, StrictSite

FILES = 500
READERS = 16

SECRETMEM = "/secretmem (deleted)"

# What the kernel keeps from every reader: its own pages, and that of memfd_secret.
UNREADABLE = {"[vvar]", "[vvar_vclock]", "[vsyscall]", SECRETMEM}

KINDS = pytest.mark.parametrize(
    "prefix", [(), without_memfd_secret.PREFIX], ids=["memfd_secret", "memfd"]
)


def scan_mount(volume: MountedVolume, label: str) -> list[Scan]:
    """All processes of a mount, each of them read as a whole."""
    found = []
    for pid in processes_of(volume.path):
        scanned = scan(pid, forms_of(label))
        assert scanned.read_bytes > 10 << 20
        assert scanned.unreadable <= UNREADABLE
        found.append(scanned)
    return found


def make_files(site: Site, own: str, count: int) -> list[str]:
    """Blobs, whose plaintext botocore handles, and messages, of several pages; their names."""
    site.make_volume("blob-*")
    for number in range(0, count, 2):
        site.write(f"blob-{number}.encrypted", site.blob(site.secret(f"{own}:{number}", 4000)))
        site.encrypt(f"message-{number + 1}", site.secret(f"{own}:{number + 1}", 10_000))
    return [f"blob-{n}" if n % 2 == 0 else f"message-{n}" for n in range(count)]


def read_all(volume: MountedVolume, names: list[str]) -> None:
    """Read every file, by many readers at once."""
    with ThreadPoolExecutor(READERS) as readers:
        for content in readers.map(lambda name: (volume.path / name).read_bytes(), names):
            assert content


@KINDS
def test_after_lock_no_process_holds_a_copy(
    strict_site: StrictSite, own: str, prefix: tuple[str, ...]
) -> None:
    site = strict_site
    names = make_files(site, own, FILES)
    volume = site.mount(prefix=prefix)
    read_all(volume, names)
    assert len(volume.status()["cached"]) == FILES
    volume.kmsfs("lock", volume.path)
    # The zygote ends on its own, workers have ended.
    lasting = {volume.launcher_pid, volume.status()["daemon_pid"]}
    assert volume.workers() == []
    wait_until(lambda: set(processes_of(volume.path)) == lasting, "the zygote has ended")
    scanned = scan_mount(volume, own)
    assert {one.process for one in scanned} == {"kmsfs-launcher", "kmsfs-daemon"}
    assert [one for one in scanned if one.hits] == []


def test_memory_of_the_daemon_returns_to_where_it_began(strict_site: StrictSite, own: str) -> None:
    site = strict_site
    names = make_files(site, own, 40)
    volume = site.mount()
    pid = volume.status()["daemon_pid"]
    # What the interpreter needs for serving and locking stays mapped from now on.
    read_all(volume, names)
    volume.kmsfs("lock", volume.path)
    volume.kmsfs("unlock", volume.path)
    locked, mapped = locked_kib(pid), mapping_names(pid)
    assert mapped[SECRETMEM] == 0
    read_all(volume, names)
    if volume.status()["plaintext_in"] != ["memfd_secret"]:
        pytest.skip("this kernel has no memfd_secret")
    assert mapping_names(pid)[SECRETMEM] == len(names)
    assert locked_kib(pid) == locked + 20 * 4 + 20 * 12
    volume.kmsfs("lock", volume.path)
    assert locked_kib(pid) == locked
    now = mapping_names(pid)
    assert now[SECRETMEM] == 0
    # Threads that wait for work end after some time, and their stacks go.
    assert abs(now.total() - mapped.total()) < len(names) // 2


def mapping_names(pid: int) -> Counter[str]:
    """How many mappings of each name a process has."""
    return Counter(found.name for found in ranges_of(pid))


def test_without_memfd_secret_the_daemon_holds_each_file_exactly_once(
    strict_site: StrictSite, own: str
) -> None:
    site = strict_site
    names = make_files(site, own, 20)
    volume = site.mount(prefix=without_memfd_secret.PREFIX)
    read_all(volume, names)
    pid = volume.status()["daemon_pid"]
    firsts = {str(n): site.secret(f"{own}:{n}", 64).partition(b"\n")[0] for n in range(20)}
    assert scan(pid, firsts).count() == dict.fromkeys(firsts, 1)
    assert set(scan(pid, forms_of(own)).count()) == {"raw"}


@KINDS
def test_launcher_and_zygote_never_hold_any(
    strict_site: StrictSite, own: str, prefix: tuple[str, ...]
) -> None:
    site = strict_site
    names = make_files(site, own, 20)
    volume = site.mount(prefix=prefix)
    read_all(volume, names)
    status = volume.status()
    for pid in (parent_of(status["daemon_pid"]), status["zygote_pid"]):
        assert scan(pid, forms_of(own)).hits == []


def test_with_memfd_secret_not_even_root_finds_a_copy_while_files_are_served(
    strict_site: StrictSite, own: str
) -> None:
    site = strict_site
    names = make_files(site, own, 20)
    volume = site.mount()
    read_all(volume, names)
    if volume.status()["plaintext_in"] != ["memfd_secret"]:
        pytest.skip("this kernel has no memfd_secret")
    assert scan(volume.status()["daemon_pid"], forms_of(own)).hits == []


@KINDS
@pytest.mark.parametrize("form", ["blob", "message"])
def test_an_idle_worker_holds_none_after_its_replies(
    strict_site: StrictSite, own: str, prefix: tuple[str, ...], form: str
) -> None:
    site = strict_site
    names = [name for name in make_files(site, own, 40) if name.startswith(form)]
    volume = site.mount(prefix=prefix)
    read_all(volume, names)
    workers = volume.workers()
    for pid in workers:
        wait_until(lambda pid=pid: handed_over(pid), "the daemon has taken the memory over")
    scanned = []
    for pid in workers:
        # One that was idle for long enough has ended.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            scanned.append(scan(pid, forms_of(own)))
    assert {one.process for one in scanned} == {"kmsfs-worker"}
    assert [one for one in scanned if one.hits] == []


def handed_over(pid: int) -> bool:
    """Whether a worker has no memory mapped that is for another process."""
    return not any("secretmem" in r.name or "memfd:" in r.name for r in ranges_of(pid))


def test_copies_are_found_in_a_process_that_decrypts_with_botocore_in_place(
    strict_site: StrictSite, own: str
) -> None:
    site = strict_site
    blob = base64.b64encode(site.blob(site.secret(own, 4000))).decode()
    with control_process("decrypt", site.key_arn, blob, env=site.env) as pid:
        found = scan(pid, forms_of(own)).count()
    assert found["raw"] > 0
    assert sum(count for form, count in found.items() if form.startswith("base64")) > 0


@pytest.mark.parametrize("form", sorted(forms_of("01234567")))
def test_every_form_is_found_in_a_process_that_keeps_it(own: str, form: str) -> None:
    kept = b"?" * 3000 + forms_of(own)[form] + b"?" * 3000
    with control_process("keep", given=kept) as pid:
        assert scan(pid, forms_of(own)).count()[form] > 0


def test_what_crosses_from_one_piece_read_to_the_next_is_found_once(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with control_process("keep", given=secret(own, 20_000)) as pid:
        found = scan(pid, forms_of(own)).count()
        monkeypatch.setattr(memory_scan, "_CHUNK_BYTES", 4096)
        assert scan(pid, forms_of(own)).count() == found
    assert found["raw"] > 0
