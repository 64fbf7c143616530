"""How long a plaintext is held, and what happens when its time is over."""

from tests.support.mounts import strerror_of_cat, wait_until
from tests.support.sites import StrictSite


def test_within_its_ttl_a_plaintext_serves_every_open_with_one_call(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.write("file.encrypted", site.blob(site.secret("file", 100)))
    volume = site.mount()
    for _ in range(5):
        assert strerror_of_cat(volume.path / "file") == ""
    assert len(site.kms.calls("Decrypt")) == 1


def test_after_its_ttl_kms_is_asked_again_and_its_refusal_takes_the_file_away(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("[cache]\nttl_s = 0.2\n")
    site.write("file.encrypted", site.blob(site.secret("file", 100)))
    volume = site.mount()
    assert strerror_of_cat(volume.path / "file") == ""
    wait_until(lambda: volume.status()["cached"] == [], "it is wiped")
    assert volume.status()["cached_bytes"] == 0
    site.client.disable_key(KeyId=site.key_arn)
    assert strerror_of_cat(volume.path / "file") == "Key has been revoked"


def test_an_open_file_is_readable_past_its_ttl_and_wiped_at_its_last_close(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("[cache]\nttl_s = 0.2\n")
    plaintext = site.secret("file", 9000)
    site.write("file.encrypted", site.blob(plaintext[:4000]))
    volume = site.mount()
    with (volume.path / "file").open("rb", buffering=0) as opened:
        age = 0.0
        while age < 0.3:
            age = volume.status()["cached"][0]["age_s"]
        site.client.disable_key(KeyId=site.key_arn)
        assert opened.read() == plaintext[:4000]
        assert strerror_of_cat(volume.path / "file") == "Key has been revoked"
    wait_until(lambda: volume.status()["cached"] == [], "it is wiped")


def test_idle_plaintext_is_wiped_before_its_ttl(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("[cache]\nidle_s = 0.2\n")
    site.write("file.encrypted", site.blob(site.secret("file", 100)))
    volume = site.mount()
    assert strerror_of_cat(volume.path / "file") == ""
    wait_until(lambda: volume.status()["cached_bytes"] == 0, "it is wiped")
    assert strerror_of_cat(volume.path / "file") == ""
    assert len(site.kms.calls("Decrypt")) == 2


def test_stale_plaintext_outlives_an_outage_but_never_a_refusal(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume("**")
    site.append_config("deadline_s = 1.5\n[cache]\nttl_s = 0.1\nstale_s = 600\n")
    site.write("file.encrypted", site.blob(site.secret("file", 100)))
    volume = site.mount()
    assert strerror_of_cat(volume.path / "file") == ""
    site.kms.fail("KMSInternalException")
    wait_until(lambda: volume.status()["cached"][0]["age_s"] > 0.1, "its ttl is over")
    assert strerror_of_cat(volume.path / "file") == ""
    assert site.kms.calls("Decrypt")[-1].error == "KMSInternalException"
    site.kms.heal()
    site.client.disable_key(KeyId=site.key_arn)
    assert strerror_of_cat(volume.path / "file") == "Key has been revoked"
    assert volume.status()["cached"] == []
    site.client.enable_key(KeyId=site.key_arn)
    site.kms.fail("KMSInternalException")
    assert strerror_of_cat(volume.path / "file") == "Connection timed out"
