"""`kmsfs status --metrics`, and staleness in `status`: what a mount has done and how it is."""

import pytest

from tests.support.metrics import Exposition
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.refusals import exit_code_of_mount
from tests.support.sites import StrictSite


def metrics_of(volume: MountedVolume) -> Exposition:
    """The metrics of one mount, which are of no other."""
    found = Exposition.of(volume.kmsfs("status", "--metrics", volume.path).output)
    assert {dict(labels)["mountpoint"] for _, labels in found.series} == {str(volume.path)}
    return found


def test_opens_decryptions_and_refusals_are_counted(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.make_volume(key_ids=(site.key_arn, other.arn))
    site.encrypt("key", site.secret("key", 300))
    site.encrypt("refused", site.secret("refused", 40), key_arn=other.arn)
    site.client.disable_key(KeyId=other.arn)
    volume = site.mount(exit_code=exit_code_of_mount(view))
    for _ in range(3):
        assert strerror_of_cat(volume.path / "key") == ""
    assert strerror_of_cat(volume.path / "refused") != ""

    found = metrics_of(volume)

    # Opens in a ramfs are the kernel's.
    opens = {"fuse": (1.0, 2.0, 0.0, 1.0), "ramfs": (None, None, None, None)}[view]
    assert opens == (
        found.value("kmsfs_opens_after_decryption_total"),
        found.value("kmsfs_opens_from_memory_total"),
        found.value("kmsfs_opens_stale_total"),
        found.value("kmsfs_opens_refused_total", error="KeyUnusable"),
    )
    assert found.value("kmsfs_decryptions_total", volume="web", view=view) == 1
    assert found.value("kmsfs_decrypted_bytes_total") == 300
    assert 0 < (found.value("kmsfs_decryption_seconds_total") or 0) < 60
    # The ramfs view tries again by itself.
    assert (found.value("kmsfs_decryptions_failed_total", error="KeyUnusable") or 0) >= 1
    assert found.value("kmsfs_files_served") == 2
    assert found.value("kmsfs_files_failing") == 1
    assert found.value("kmsfs_plaintexts_held") == 1
    assert found.value("kmsfs_cached_bytes") == 4096
    assert (found.value("kmsfs_budget_bytes") or 0) > 4096
    assert found.value("kmsfs_up") == 1
    assert found.value("kmsfs_locked") == 0


def test_an_outage_shows_as_staleness(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 1.5\n[cache]\nttl_s = 0.1\nstale_s = 600\n")
    content = site.secret("key", 40)
    site.encrypt("key", content)
    volume = site.mount()
    assert (volume.path / "key").read_bytes() == content
    site.kms.fail("KMSInternalException")
    wait_until(lambda: volume.status()["stale_count"] == 1, "its time is over")

    assert (volume.path / "key").read_bytes() == content

    found = metrics_of(volume)
    assert found.value("kmsfs_files_stale") == 1
    assert found.value("kmsfs_plaintexts_held") == 1
    status = volume.status()
    text = volume.kmsfs("status", volume.path).output
    assert "\n  stale    1 file, " in text
    if view == "fuse":
        (held,) = status["cached"]
        assert held["stale"]
        assert "\n    key: " in text.partition("  stale ")[2].partition("  ignored ")[0]
    else:
        assert [item["path"] for item in status["ram"]["stale"]] == ["key"]


def test_what_is_within_its_time_is_not_stale(strict_site: StrictSite) -> None:
    strict_site.make_volume()
    strict_site.encrypt("key", strict_site.secret("key", 40))
    volume = strict_site.mount()
    with (volume.path / "key").open("rb"):
        assert metrics_of(volume).value("kmsfs_files_stale") == 0
        assert not any(entry["stale"] for entry in volume.status()["cached"])
        assert "\n  stale " not in volume.kmsfs("status", volume.path).output


def test_lock_shows(strict_site: StrictSite, view: str) -> None:
    strict_site.make_volume()
    strict_site.encrypt("key", strict_site.secret("key", 40))
    volume = strict_site.mount()
    assert strerror_of_cat(volume.path / "key") == ""
    volume.kmsfs("lock", volume.path)
    found = metrics_of(volume)
    assert found.value("kmsfs_locked") == 1
    assert found.value("kmsfs_plaintexts_held") == 0
    assert found.value("kmsfs_cached_bytes") == 0
    assert found.value("kmsfs_worker_processes") == 0
    # In the ramfs view locked memory holds a plaintext only until it is copied.
    reason = {"fuse": "lock", "ramfs": "expired"}[view]
    assert found.value("kmsfs_plaintexts_wiped_total", reason=reason) == 1
    volume.kmsfs("unlock", volume.path)
    assert metrics_of(volume).value("kmsfs_locked") == 0


def test_a_new_set_of_files_counts_in_the_ramfs_alone(strict_site: StrictSite, view: str) -> None:
    strict_site.make_volume()
    strict_site.encrypt("key", strict_site.secret("key", 40))
    volume = strict_site.mount()
    name = "kmsfs_sets_published_total"
    assert metrics_of(volume).value(name) == {"fuse": None, "ramfs": 1}[view]
    content = strict_site.secret("newer", 41)
    strict_site.encrypt("key", content)
    wait_until(lambda: (volume.path / "key").read_bytes() == content, "the change is seen")
    assert metrics_of(volume).value(name) == {"fuse": None, "ramfs": 2}[view]


@pytest.mark.parametrize("other", ["--json", "--security"])
def test_metrics_go_with_no_other_form(strict_site: StrictSite, other: str) -> None:
    strict_site.make_volume()
    volume = strict_site.mount()
    done = volume.kmsfs("status", "--metrics", other, volume.path, exit_code=2)
    assert done.stderr == f"kmsfs: error: --metrics and {other} contradict each other\n"
    assert done.output == ""
