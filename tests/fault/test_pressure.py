"""Memory and descriptors that run out: who has to make room, who is refused, and what goes on."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest

from kmsfs.memory.process import DAEMON_DESCRIPTORS
from tests.support.commands import run_kmsfs
from tests.support.limits import limited, out_of_descriptors
from tests.support.mounts import MountedVolume, processes_of, strerror_of_cat, wait_until
from tests.support.sites import StrictSite

NO_MEMORY = "Cannot allocate memory"
TIMED_OUT = "Connection timed out"
KIB = 1 << 10

# Far more than a refusal takes, and less than KMS does where it is made slow.
AT_ONCE_S = 1.5
SLOW_S = 3.0

FOR_THREE = '[cache]\nmax_bytes = "128KiB"\nmax_file_bytes = "40KiB"\n'
"""Room for three of the files below."""


def volume_of(site: StrictSite, sizes: dict[str, int], settings: str = "") -> None:
    """A volume with files of these sizes."""
    site.make_volume()
    site.append_config(settings)
    for name, size_bytes in sizes.items():
        site.encrypt(name, site.secret(name, size_bytes))


def read(volume: MountedVolume, name: str) -> None:
    """Open a file, read it and close it."""
    assert strerror_of_cat(volume.path / name) == ""


def cached(volume: MountedVolume) -> list[str]:
    """The files whose plaintext is held."""
    return sorted(item["path"] for item in volume.status()["cached"])


def weaknesses(volume: MountedVolume) -> str:
    """What `kmsfs status` says is weaker than it could be."""
    return "\n".join(volume.status()["weaknesses"])


# --- the budget of memory ----------------------------------------------------------------------


def test_what_was_used_least_recently_makes_room(strict_site: StrictSite) -> None:
    site = strict_site
    names = ("a", "b", "c", "d")
    volume_of(site, dict.fromkeys(names, 40 * KIB), FOR_THREE)
    volume = site.mount("--view", "fuse")
    for name in ("a", "b", "c", "a", "d"):
        read(volume, name)
    assert cached(volume) == ["a", "c", "d"]
    site.kms.forget_calls()
    read(volume, "a")
    read(volume, "b")
    assert cached(volume) == ["a", "b", "d"]
    assert len(site.kms.calls("Decrypt")) == 1


def test_what_is_open_stays_and_what_was_used_since_goes(strict_site: StrictSite) -> None:
    site = strict_site
    volume_of(site, dict.fromkeys(("a", "b", "c", "d"), 40 * KIB), FOR_THREE)
    volume = site.mount("--view", "fuse")
    with (volume.path / "a").open("rb") as oldest:
        for name in ("b", "c", "d"):
            read(volume, name)
        assert cached(volume) == ["a", "c", "d"]
        assert oldest.read() == site.secret("a", 40 * KIB)


def test_a_budget_full_of_open_files_refuses_the_next_at_once_and_without_kms(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    volume_of(
        site, dict.fromkeys(("a", "b", "closed", "next"), 40 * KIB),
        FOR_THREE,
    )  # fmt: skip
    volume = site.mount("--view", "fuse")
    read(volume, "closed")
    first, second = (volume.path / "a").open("rb"), (volume.path / "b").open("rb")
    with first, second:
        third = (volume.path / "closed").open("rb")
        site.kms.forget_calls()
        site.key.latency_s = SLOW_S
        with third:
            started = time.monotonic()
            assert strerror_of_cat(volume.path / "next") == NO_MEMORY
            assert time.monotonic() - started < AT_ONCE_S
            assert site.kms.calls("Decrypt") == []
            assert volume.failing() == {"next": "LockedMemoryExhausted"}
            assert third.read() == site.secret("closed", 40 * KIB)
        site.key.latency_s = 0.0
        read(volume, "next")
        assert cached(volume) == ["a", "b", "next"]
        assert volume.failing() == {}
        assert first.read() == site.secret("a", 40 * KIB)
        assert second.read() == site.secret("b", 40 * KIB)


# --- the limit of locked memory ----------------------------------------------------------------

# What the budget leaves aside is 1 MiB.
LITTLE_BYTES = (1 << 20) + 512 * KIB


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_a_low_limit_of_locked_memory_is_shown_and_costs_only_what_does_not_fit(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    small = {f"small-{number}": 200 * KIB for number in range(12)}
    volume_of(site, {**small, "large": 600 * KIB})
    low = limited(memlock=f"{LITTLE_BYTES}:{LITTLE_BYTES}")
    volume = site.mount(prefix=low, exit_code=1 if view == "ramfs" else 0)
    # In the ramfs view all were decrypted already, several at a time, through the same budget.
    assert strerror_of_cat(volume.path / "large") in (NO_MEMORY, "No such file or directory")
    for name, size_bytes in small.items():
        assert (volume.path / name).read_bytes() == site.secret(name, size_bytes)
    assert volume.failing() == {"large": "LockedMemoryExhausted"}
    assert f"locked memory is limited to {512 * KIB} bytes" in weaknesses(volume)


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_strict_refuses_a_low_limit_of_locked_memory(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    volume_of(site, {"key": 100})
    path = site.directory / "strict"
    path.mkdir()
    done = run_kmsfs(
        ["mount", site.source, path, "--view", view, "--strict"],
        env=site.env,
        prefix=limited(memlock=f"{LITTLE_BYTES}:{LITTLE_BYTES}"),
        exit_code=6,
    )
    assert f"room for {512 * KIB} of {64 << 20} bytes" in done.stderr
    assert "LimitMEMLOCK" in done.stderr
    assert processes_of(path) == []


def test_a_soft_limit_of_locked_memory_is_raised(strict_site: StrictSite) -> None:
    site = strict_site
    volume_of(site, {"key": 600 * KIB}, '[cache]\nmax_bytes = "2MiB"\nmax_file_bytes = "1MiB"\n')
    volume = site.mount(prefix=limited(memlock=f"{LITTLE_BYTES}:{8 << 20}"))
    read(volume, "key")
    assert "locked memory is limited" not in weaknesses(volume)


# --- the limit of descriptors ------------------------------------------------------------------


def test_a_soft_limit_of_descriptors_is_raised_for_the_daemon(strict_site: StrictSite) -> None:
    site = strict_site
    volume_of(site, {"key": 100})
    volume = site.mount(prefix=limited(nofile="100:4096"))
    read(volume, "key")
    status = volume.status()
    limit = resource.prlimit(status["daemon_pid"], resource.RLIMIT_NOFILE)
    assert limit == (DAEMON_DESCRIPTORS, 4096)
    assert "descriptors" not in weaknesses(volume)


def test_too_few_descriptors_to_serve_are_refused(strict_site: StrictSite) -> None:
    site = strict_site
    volume_of(site, {"key": 100})
    path = site.directory / "mnt"
    path.mkdir()
    done = run_kmsfs(
        ["mount", site.source, path],
        env=site.env,
        prefix=limited(nofile="100:100"),
        exit_code=6,
    )
    assert "the limit of descriptors is 100, and cannot be raised to 128" in done.stderr
    assert processes_of(path) == []


def test_a_low_limit_of_descriptors_refuses_opens_and_nothing_else(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    count, at_once = 100, 44
    volume_of(site, {f"file-{number}": 100 for number in range(count)}, "deadline_s = 20.0\n")
    volume = site.mount("--view", "fuse", prefix=limited(nofile="300:300"))
    found = weaknesses(volume)
    assert f"at most {at_once} files can be decrypted at once: 300 descriptors" in found
    read(volume, "file-0")
    before = volume.status()
    site.key.latency_s = 0.5
    outcomes: list[str] = []
    told = threading.Lock()

    def open_one(path: Path) -> None:
        try:
            os.close(os.open(path, os.O_RDONLY))
            outcome = ""
        except OSError as error:
            outcome = error.strerror or ""
        with told:
            outcomes.append(outcome)

    readers = [
        threading.Thread(target=open_one, args=(volume.path / f"file-{number}",))
        for number in range(1, count)
    ]
    for reader in readers:
        reader.start()
    wait_until(lambda: TIMED_OUT in outcomes, "some are refused")
    assert volume.status()["daemon_pid"] == before["daemon_pid"]
    for reader in readers:
        reader.join()
    assert set(outcomes) == {"", TIMED_OUT}
    assert outcomes.count("") >= at_once
    failing = {item["reason"] for item in volume.status()["failing"]}
    assert all("TooManyWaiting" not in reason for reason in failing)
    site.key.latency_s = 0.0
    for number in range(1, count, 20):
        read(volume, f"file-{number}")
    after = volume.status()
    assert (after["daemon_pid"], after["zygote_pid"]) == (
        before["daemon_pid"], before["zygote_pid"],
    )  # fmt: skip


@pytest.mark.parametrize("view", ["fuse", "ramfs"])
def test_a_daemon_without_a_descriptor_left_goes_on_when_it_has_some(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    volume_of(site, {"known": 100, "other": 100})
    volume = site.mount()
    read(volume, "known")
    daemon_pid, launcher_pid = volume.status()["daemon_pid"], volume.launcher_pid
    with (volume.path / "known").open("rb") as held, out_of_descriptors(daemon_pid):
        if view == "fuse":
            assert strerror_of_cat(volume.path / "other") == "Input/output error"
        site.encrypt("known", site.secret("changed meanwhile", 100))
        assert held.read() == site.secret("known", 100)
    new = site.secret("changed after", 100)
    site.encrypt("known", new)
    wait_until(lambda: (volume.path / "known").read_bytes() == new, "the newest is served")
    read(volume, "other")
    assert (volume.status()["daemon_pid"], volume.launcher_pid) == (daemon_pid, launcher_pid)
    assert volume.failing() == {}
