"""Where a mount's workers get credentials, how often, and what becomes of them."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import without_memfd_secret
from tests.support.commands import run_kmsfs
from tests.support.credential_source import PROFILE, CredentialSource
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_gone, wait_until
from tests.support.sites import StrictSite

_FILES = 12


class Fixture:
    """A mount whose credentials a program gives."""

    def __init__(self, site: StrictSite) -> None:
        self.site = site
        self.source = CredentialSource(site.directory / "program", site.kms.admin)
        self.config = site.directory / "config"
        self.config.write_text(self.source.profile)
        for number in range(_FILES):
            blob = site.blob(site.secret(f"file {number}", 50))
            site.write(f"file-{number}.encrypted", blob)
        self._next = iter(range(_FILES))
        env = {
            name: value
            for name, value in site.env.items()
            if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        }
        self.env = {**env, "AWS_CONFIG_FILE": str(self.config), "AWS_PROFILE": PROFILE}

    def mount(self) -> MountedVolume:
        """Mount it."""
        return self.site.mount(env=self.env)

    def next_file(self, volume: MountedVolume) -> Path:
        """A file that was not read yet."""
        return volume.path / f"file-{next(self._next)}"


@pytest.fixture
def given(strict_site: StrictSite) -> Fixture:
    """A mount to be made, and the program that gives its credentials for an hour."""
    return Fixture(strict_site)


def end_workers(volume: MountedVolume) -> None:
    """What idleness does to them, now."""
    pids = volume.workers()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)
    wait_until(lambda: not volume.status()["worker_pids"], "the daemon has noticed")


def asks_anew(volume: MountedVolume) -> bool:
    """Whether status says that credentials do not rest anywhere."""
    start = "every worker asks for session credentials anew"
    return any(text.startswith(start) for text in volume.status()["weaknesses"])


def read_at_once(paths: list[Path]) -> None:
    readers = [
        subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL, env={"LC_ALL": "C"})
        for path in paths
    ]
    assert [reader.wait(20) for reader in readers] == [0] * len(paths)


def test_a_burst_of_workers_asks_the_source_once_and_so_does_whoever_comes_later(
    given: Fixture,
) -> None:
    given.source.give(given.site.kms.admin, takes_s=0.3)
    given.site.key.latency_s = 0.3
    volume = given.mount()
    read_at_once([given.next_file(volume) for _ in range(8)])
    assert len(volume.workers()) == 8
    assert given.source.runs == 1
    given.site.key.latency_s = 0.0
    end_workers(volume)
    assert strerror_of_cat(given.next_file(volume)) == ""
    assert given.source.runs == 1
    assert not asks_anew(volume)


def test_lock_forgets_credentials(given: Fixture) -> None:
    volume = given.mount()
    assert strerror_of_cat(given.next_file(volume)) == ""
    volume.kmsfs("lock", volume.path)
    volume.kmsfs("unlock", volume.path)
    assert given.source.runs == 1
    assert strerror_of_cat(given.next_file(volume)) == ""
    assert given.source.runs == 2


def test_a_worker_whose_credentials_end_soon_is_replaced_after_its_answer(given: Fixture) -> None:
    given.source.give(given.site.kms.admin, seconds=30)
    volume = given.mount()
    for asked in (1, 2):
        assert strerror_of_cat(given.next_file(volume)) == ""
        assert given.source.runs == asked
        wait_until(lambda: volume.workers() == [], "the worker has ended")
    given.source.give(given.site.kms.admin)
    for _ in range(2):
        assert strerror_of_cat(given.next_file(volume)) == ""
        assert len(volume.workers()) == 1
        assert given.source.runs == 3
        end_workers(volume)


def test_credentials_that_were_replaced_are_found_within_the_open(given: Fixture) -> None:
    kms = given.site.kms
    first, second = kms.create_identity("first"), kms.create_identity("second")
    given.source.give(first)
    given.site.key.latency_s = 0.3
    volume = given.mount()
    read_at_once([given.next_file(volume) for _ in range(3)])
    given.site.key.latency_s = 0.0
    first.expired = True
    given.source.give(second)
    assert strerror_of_cat(given.next_file(volume)) == ""
    assert kms.calls("Decrypt")[-1].access_key_id == second.access_key_id
    assert given.source.runs == 2


def test_a_source_that_fails_is_asked_again_at_the_next_open(given: Fixture) -> None:
    given.source.give(None)
    volume = given.mount()
    path = given.next_file(volume)
    assert strerror_of_cat(path) == "Key has expired"
    (worker,) = volume.workers()
    given.source.give(given.site.kms.admin)
    assert strerror_of_cat(path) == ""
    assert volume.workers() == [worker]
    assert given.source.runs == 2


def test_a_source_that_fails_slowly_costs_a_burst_no_more_than_one_file(given: Fixture) -> None:
    given.source.give(None, takes_s=2.0)
    volume = given.mount()
    readers = [
        subprocess.Popen(
            ["cat", given.next_file(volume)], stderr=subprocess.PIPE, env={"LC_ALL": "C"}, text=True
        )
        for _ in range(8)
    ]
    said = {reader.communicate(timeout=20)[1].strip().rpartition(": ")[2] for reader in readers}
    assert said == {"Key has expired"}
    assert given.source.runs == 1


def test_refused_credentials_that_nobody_replaces_are_an_error_and_then_recover(
    given: Fixture,
) -> None:
    volume = given.mount()
    assert strerror_of_cat(given.next_file(volume)) == ""
    given.site.kms.admin.expired = True
    path = given.next_file(volume)
    assert strerror_of_cat(path) == "Key has expired"
    given.site.kms.admin.expired = False
    assert strerror_of_cat(path) == ""


def test_without_memfd_secret_every_worker_asks_and_status_says_so(given: Fixture) -> None:
    mountpoint = given.site.directory / "mnt"
    mountpoint.mkdir()
    arguments = ["mount", given.site.source, mountpoint, "--key-id", given.site.key_arn]
    run_kmsfs(arguments, env=given.env, prefix=without_memfd_secret.PREFIX)
    volume = MountedVolume(given.site.source, mountpoint, given.env)
    given.site.mounter.mounted.append(volume)
    for asked in (1, 2):
        assert strerror_of_cat(given.next_file(volume)) == ""
        assert given.source.runs == asked
        end_workers(volume)
    assert asks_anew(volume)
