"""Workers that die, hang or live on a lesser kernel, under a real mount."""

import os
import signal
import subprocess
import threading
from pathlib import Path

from tests.support import without_memfd_secret
from tests.support.mounts import (
    MountedVolume,
    process_name,
    strerror_of_cat,
    wait_gone,
    wait_until,
)
from tests.support.sites import StrictSite


def the_worker(volume: MountedVolume) -> int:
    """Process id of the only worker there is, once there is one."""
    wait_until(lambda: len(volume.workers()) == 1, "there is a worker")
    return volume.workers()[0]


def begin_reading(path: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["cat", path], env={"LC_ALL": "C"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_worker_killed_in_mid_call_costs_one_retry_that_nobody_sees(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    plaintext = site.secret("file", 100)
    site.write("file.encrypted", site.blob(plaintext))
    site.key.latency_s = 1.0
    volume = site.mount()
    reader = begin_reading(volume.path / "file")
    first = the_worker(volume)
    assert process_name(first) == "kmsfs-worker"
    os.kill(first, signal.SIGKILL)
    site.key.latency_s = 0.0
    output, _ = reader.communicate(timeout=10)
    assert output == plaintext
    wait_gone(first)


def test_two_lost_workers_are_an_io_error_for_their_own_file_only(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.write("unlucky.encrypted", site.blob(site.secret("unlucky", 100)))
    site.key.latency_s = 1.5
    volume = site.mount()
    reader = begin_reading(volume.path / "unlucky")
    first = the_worker(volume)
    os.kill(first, signal.SIGKILL)
    wait_gone(first)
    os.kill(the_worker(volume), signal.SIGKILL)
    _, errors = reader.communicate(timeout=10)
    assert errors.decode().strip().endswith("Input/output error")
    failing = volume.status()["failing"]
    assert [item["reason"].partition(":")[0] for item in failing] == ["WorkerFailed"]
    site.key.latency_s = 0.0
    assert strerror_of_cat(volume.path / "unlucky") == ""
    assert volume.status()["failing"] == []


def test_a_stopped_worker_is_replaced_within_the_deadline(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("deadline_s = 3.0\n")
    plaintext = site.secret("file", 100)
    site.write("file.encrypted", site.blob(plaintext))
    site.key.latency_s = 0.7
    volume = site.mount()
    reader = begin_reading(volume.path / "file")
    hung = the_worker(volume)
    os.kill(hung, signal.SIGSTOP)
    site.key.latency_s = 0.0
    output, _ = reader.communicate(timeout=3.5)
    assert output == plaintext
    wait_gone(hung)


def test_idle_workers_end_and_the_next_open_gets_a_new_one(strict_site: StrictSite) -> None:
    site = strict_site
    blob = site.blob(site.secret("file", 100))
    site.write("one.encrypted", blob)
    site.write("two.encrypted", blob)
    volume = site.mount()
    assert strerror_of_cat(volume.path / "one") == ""
    first = the_worker(volume)
    wait_gone(first)
    wait_until(lambda: volume.workers() == [], "none is left")
    assert strerror_of_cat(volume.path / "two") == ""
    assert the_worker(volume) != first


def test_at_most_eight_calls_are_under_way_at_once(strict_site: StrictSite) -> None:
    site = strict_site
    for number in range(20):
        site.write(f"file-{number}.encrypted", site.blob(site.secret(f"file {number}", 50)))
    site.key.latency_s = 0.5
    volume = site.mount()
    readers = [
        threading.Thread(target=strerror_of_cat, args=(volume.path / f"file-{number}",))
        for number in range(20)
    ]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        most = max(most, len(volume.workers()))
    assert most == 8


def test_without_memfd_secret_plaintext_lies_in_a_locked_memfd_and_status_says_so(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    plaintext = site.secret("file", 20_000)
    site.make_volume()
    site.encrypt("file", plaintext)
    volume = site.mount(prefix=without_memfd_secret.PREFIX)
    daemon_pid = volume.status()["daemon_pid"]
    before = locked_kib(daemon_pid)
    assert (volume.path / "file").read_bytes() == plaintext
    status = volume.status()
    assert status["plaintext_in"] == ["memfd"]
    assert any("memfd_secret" in text for text in status["weaknesses"])
    assert locked_kib(daemon_pid) == before + 20
    volume.kmsfs("lock", volume.path)
    assert locked_kib(daemon_pid) == before


def locked_kib(pid: int) -> int:
    """VmLck of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1])
    raise AssertionError("no VmLck line")
