"""Files that are decrypted before anybody opens them, because the volume's owner asked for it."""

import time

from kmsfs.views.prefetch import MAX_START_S
from tests.support.commands import run_kmsfs
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import MountedVolume, wait_until
from tests.support.sites import StrictSite


def volume_that_prefetches(site: StrictSite, *patterns: str) -> None:
    """A volume of four files with such a `prefetch`."""
    site.make_volume()
    listed = ", ".join(f'"{pattern}"' for pattern in patterns)
    site.append_config(f"deadline_s = 2.0\n[cache]\nprefetch = [{listed}]\n")
    for name in ("a.pem", "b.txt", "sub/c.pem", "sub/d.txt"):
        site.encrypt(name, site.secret(name, 100))


def cached(volume: MountedVolume) -> list[str]:
    """The files whose plaintext is held."""
    return sorted(item["path"] for item in volume.status()["cached"])


def test_with_wait_what_it_names_is_there_when_the_mount_is_and_nothing_else(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    volume_that_prefetches(site, "*.pem", "sub/d.*")
    volume = site.mount("--wait")
    assert cached(volume) == ["a.pem", "sub/d.txt"]
    assert len(site.kms.calls("Decrypt")) == 2
    for name in ("a.pem", "sub/d.txt"):
        assert (volume.path / name).read_bytes() == site.secret(name, 100)
    assert sorted(volume.names("sub")) == ["c.pem", "d.txt"]
    assert len(site.kms.calls("Decrypt")) == 2
    assert (volume.path / "b.txt").read_bytes() == site.secret("b.txt", 100)


def test_wait_is_a_mount_option_and_two_asterisks_are_all_files(strict_site: StrictSite) -> None:
    site = strict_site
    volume_that_prefetches(site, "**")
    volume = site.mount("-o", "wait")
    assert cached(volume) == ["a.pem", "b.txt", "sub/c.pem", "sub/d.txt"]


def test_in_the_background_it_begins_soon_after_the_mount(strict_site: StrictSite) -> None:
    site = strict_site
    volume_that_prefetches(site, "**/*.pem")
    volume = site.mount()
    wait_until(lambda: cached(volume) == ["a.pem", "sub/c.pem"], "it is done", MAX_START_S + 10.0)
    assert len(site.kms.calls("Decrypt")) == 2


def test_without_it_metadata_and_wait_never_call_kms(strict_site: StrictSite) -> None:
    site = strict_site
    volume_that_prefetches(site)
    volume = site.mount("--wait")
    assert volume.names() == ["a.pem", "b.txt", "sub"]
    assert site.kms.calls("Decrypt") == []


def test_what_fails_is_shown_and_stops_neither_the_others_nor_the_mount(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    volume_that_prefetches(site, "**")
    site.write("bad.encrypted", (site.source / "a.pem.encrypted").read_bytes())
    volume = site.mount("--wait")
    assert volume.failing() == {"bad": "ContextMismatch"}
    assert len(cached(volume)) == 4
    volume.umount()
    arguments = ["mount", site.source, volume.path, "--wait", "--require-all"]
    done = run_kmsfs(arguments, env=site.env, exit_code=6)
    assert "kmsfs: error: bad: " in done.stderr


def test_a_kms_that_hangs_holds_up_neither_the_mount_nor_its_metadata(
    strict_site: StrictSite, fault_proxy: FaultProxy
) -> None:
    site = strict_site
    volume_that_prefetches(site, "**")
    fault_proxy.inject(Fault.HANG)
    started = time.monotonic()
    volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": fault_proxy.endpoint_url})
    fault_proxy.wait_for_requests(1, MAX_START_S + 10.0)
    assert volume.names() == ["a.pem", "b.txt", "sub"]
    assert time.monotonic() - started < MAX_START_S + 10.0
