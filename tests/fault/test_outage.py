"""A KMS that is away: the first readers wait, the rest fail at once, and its return is noticed."""

import itertools
import json
import threading
import time

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.sites import StrictSite

TIMED_OUT = "Connection timed out"

# Opening costs milliseconds then; generous, since a process is started for each.
AT_ONCE_S = 1.0


def behind(site: StrictSite, proxy: FaultProxy, *arguments: str) -> MountedVolume:
    """The site, mounted with the proxy in front of its KMS."""
    return site.mount(*arguments, env={**site.env, "AWS_ENDPOINT_URL": proxy.endpoint_url})


def volume_of(site: StrictSite, count: int, settings: str = "") -> None:
    """A volume with so many files, and little patience."""
    site.make_volume()
    site.append_config("deadline_s = 2.0\n" + settings)
    for number in range(count):
        site.encrypt(f"file-{number}", site.secret(f"file {number}", 100))


def open_the_breaker(volume: MountedVolume) -> None:
    """Read files that fail until KMS is known to be away."""
    numbers = itertools.cycle(range(4))

    def is_open() -> bool:
        strerror_of_cat(volume.path / f"file-{next(numbers)}")
        return volume.status()["away"] != []

    wait_until(is_open, "KMS is known to be away", 30.0)


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.ERROR_503], ids=lambda fault: fault.name)
def test_a_dead_kms_costs_only_the_first_readers_time_and_its_return_is_noticed(
    strict_site: StrictSite, fault_proxy: FaultProxy, fault: Fault
) -> None:
    site = strict_site
    volume_of(site, 4)
    volume = behind(site, fault_proxy)
    fault_proxy.inject(fault)
    started = time.monotonic()
    assert strerror_of_cat(volume.path / "file-0") == TIMED_OUT
    assert time.monotonic() - started < 4.0
    open_the_breaker(volume)
    before = fault_proxy.requests
    quick = 0
    for _ in range(30):
        started = time.monotonic()
        assert strerror_of_cat(volume.path / "file-3") == TIMED_OUT
        quick += time.monotonic() - started < AT_ONCE_S
    assert quick >= 15
    assert fault_proxy.requests - before < 60
    (away,) = volume.status()["away"]
    assert away["key"] == site.key_arn
    assert away["failures"] >= 3
    text = volume.kmsfs("status", volume.path).output
    assert f"  away     KMS for {site.key_arn}: " in text
    assert json.loads(volume.kmsfs("status", volume.path, "--json").output)["away"]
    fault_proxy.heal()
    wait_until(lambda: strerror_of_cat(volume.path / "file-3") == "", "it is served", 10.0)
    assert volume.status()["away"] == []


def test_while_kms_is_away_what_is_held_is_served_and_so_is_what_may_be_stale(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    volume_of(site, 5, "[cache]\nttl_s = 0.5\nstale_s = 600\n")
    content = site.secret("file 4", 100)
    volume = behind(site, fault_proxy)
    held = (volume.path / "file-4").open("rb", buffering=0)
    fault_proxy.inject(Fault.HANG)
    open_the_breaker(volume)
    with held:
        assert held.read() == content
        asked = fault_proxy.requests
        for _ in range(20):
            assert (volume.path / "file-4").read_bytes() == content
        assert fault_proxy.requests - asked < 20


def test_a_refused_key_is_no_outage_for_itself_or_for_others(strict_site: StrictSite) -> None:
    site = strict_site
    refused = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, refused.arn))
    for number in range(6):
        site.encrypt(f"refused-{number}", site.secret("refused", 100), key_arn=refused.arn)
    site.encrypt("served", site.secret("served", 100))
    site.client.disable_key(KeyId=refused.arn)
    volume = site.mount()
    for number in range(6):
        assert strerror_of_cat(volume.path / f"refused-{number}") == "Key has been revoked"
    assert volume.status()["away"] == []
    assert strerror_of_cat(volume.path / "served") == ""
    site.client.enable_key(KeyId=refused.arn)
    assert strerror_of_cat(volume.path / "refused-0") == ""


@pytest.mark.parametrize("any_key", [False, True], ids=["key-ids", "any-key"])
def test_eight_files_of_one_hanging_key_leave_the_others_their_share(
    strict_site: StrictSite, fault_proxy: FaultProxy, *, any_key: bool
) -> None:
    site = strict_site
    hanging = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, hanging.arn))
    for number in range(8):
        site.encrypt(f"hangs-{number}", site.secret("hangs", 100), key_arn=hanging.arn)
    content = site.secret("served", 100)
    site.encrypt("served", content)
    fault_proxy.inject(Fault.HANG, key_id=hanging.arn)
    volume = behind(site, fault_proxy, *(["--any-key"] if any_key else []))
    readers = [
        threading.Thread(target=strerror_of_cat, args=(volume.path / f"hangs-{number}",))
        for number in range(8)
    ]
    for reader in readers:
        reader.start()
    fault_proxy.wait_for_requests(4)
    started = time.monotonic()
    assert (volume.path / "served").read_bytes() == content
    assert time.monotonic() - started < 2.0
    for reader in readers:
        reader.join()
    assert [key["key"] for key in volume.status()["away"]] == [hanging.arn]
    assert strerror_of_cat(volume.path / "served") == ""


def test_unlocking_asks_kms_again_at_once(strict_site: StrictSite, fault_proxy: FaultProxy) -> None:
    site = strict_site
    volume_of(site, 4)
    volume = behind(site, fault_proxy)
    fault_proxy.inject(Fault.RESET)
    open_the_breaker(volume)
    fault_proxy.heal()
    volume.kmsfs("lock", volume.path)
    volume.kmsfs("unlock", volume.path)
    assert volume.status()["away"] == []
    assert strerror_of_cat(volume.path / "file-0") == ""


def test_the_ramfs_view_is_whole_again_soon_after_kms_is_back(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    volume_of(site, 12)
    fault_proxy.inject(Fault.RESET)
    env = {**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url}
    volume = site.mount("--view", "ramfs", env=env, exit_code=1)
    assert volume.names() == []
    assert volume.status()["away"] != []
    fault_proxy.wait_for_requests(fault_proxy.requests + 10, 60.0)
    fault_proxy.heal()
    names = sorted(f"file-{number}" for number in range(12))
    wait_until(lambda: volume.names() == names, "all are back", 10.0)
    content = (volume.path / "file-7").read_bytes()
    assert content == site.secret("file 7", 100)
    assert volume.failing() == {}
