"""`kmsfs why`: an administrator sees what happened to one file, and what to do about it."""

import json
from typing import Any

from kmsfs import errors
from tests.support.mounts import MountedVolume, strerror_of_cat, wait_until
from tests.support.refusals import exit_code_of_mount
from tests.support.sites import Site, StrictSite


def why(volume: MountedVolume, name: str) -> dict[str, Any]:
    """What `kmsfs why --json` tells of a file that was opened just now."""
    strerror_of_cat(volume.path / name)
    found: dict[str, Any] = json.loads(volume.kmsfs("why", volume.path / name, "--json").output)
    return found


def test_a_role_that_is_denied_is_named_with_the_request_and_what_to_do(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    site.kms.deny(site.kms.admin, "Decrypt", site.key)
    volume = site.mount(exit_code=exit_code_of_mount(view))
    found = why(volume, "key")
    assert (found["state"], found["error"]) == ("failing", "KeyAccessDenied")
    assert found["hint"] == errors.KeyAccessDenied.hint
    call = found["call"]
    assert call["principal"] == site.kms.admin.arn
    assert call["access_key_id"] == site.kms.admin.access_key_id
    assert call["key_id"] == site.key_arn
    assert call["request_id"] in found["detail"]
    assert found["error_age_s"] < 60
    assert (found["key_arn"], found["version"], found["decrypted_age_s"]) == (None, None, None)

    text = volume.kmsfs("why", volume.path / "key").output
    assert text.startswith(f"{volume.path}/key: cannot be read\n")
    for known in (
        "error     KeyAccessDenied: Decrypt under ",
        "meaning   KMS refused: no permission",
        f"key       {site.key_arn}",
        f"asked by  {site.kms.admin.arn}, access key {site.kms.admin.access_key_id}",
        f"request   {call['request_id']}",
        f"to do     {errors.KeyAccessDenied.hint}",
    ):
        assert known in text
    assert site.kms.admin.secret_access_key not in text


def test_a_file_under_another_key_is_told_from_a_role_that_is_denied(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    other = site.kms.create_key()
    site.make_volume("bare")
    site.write("bare.encrypted", site.blob(site.secret("bare", 40), key_arn=other.arn))
    site.encrypt("bound", site.secret("bound", 40), key_arn=other.arn)
    volume = site.mount(exit_code=exit_code_of_mount(view))
    bare, bound = why(volume, "bare"), why(volume, "bound")
    assert bare["error"] == "IncorrectKey"
    assert bare["call"]["request_id"]
    assert bare["call"]["key_id"] == site.key_arn
    assert bare["call"]["access_key_id"] == site.kms.admin.access_key_id
    assert bound["error"] == "KeyNotAllowed"
    assert other.arn in bound["detail"]
    # KMS was not asked for it.
    assert bound["call"] is None


def test_a_file_that_is_fine_is_told_of_as_well(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    site.make_volume()
    for _ in range(3):
        site.encrypt("key", site.secret("key", 40))
    volume = site.mount()
    first, again = why(volume, "key"), why(volume, "key")
    for found in (first, again):
        assert (found["state"], found["error"], found["held"]) == ("served", "", True)
        assert (found["version"], found["key_arn"]) == (3, site.key_arn)
        assert found["format"] == "encryption-sdk"
        assert found["call"]["access_key_id"] == site.kms.admin.access_key_id
        assert found["call"]["request_id"]
        assert 0 <= found["decrypted_age_s"] < 60
    assert first["decrypted_age_s"] < again["decrypted_age_s"]
    assert again["from_cache"] == (view == "fuse")
    text = volume.kmsfs("why", volume.path / "key").output
    assert text.startswith(f"{volume.path}/key: served, held in memory\n")
    assert "format    encryption-sdk, version 3\n" in text


def test_what_was_refused_is_fine_once_it_is_decrypted(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    site.client.disable_key(KeyId=site.key_arn)
    volume = site.mount(exit_code=exit_code_of_mount(view))
    assert why(volume, "key")["error"] == "KeyUnusable"
    site.client.enable_key(KeyId=site.key_arn)
    volume.kmsfs("refresh", volume.path / "key")
    assert (why(volume, "key")["state"], why(volume, "key")["error"]) == ("served", "")


def test_a_file_that_is_served_stale_says_since_when_and_why(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 1.5\n[cache]\nttl_s = 0.1\nstale_s = 600\n")
    site.encrypt("key", site.secret("key", 40))
    volume = site.mount()
    why(volume, "key")
    site.kms.fail("KMSInternalException")
    wait_until(lambda: why(volume, "key")["state"] == "stale", "its time is over")
    found = why(volume, "key")
    assert found["error"] == "KmsUnreachable"
    assert found["version"] == 1
    assert found["decrypted_age_s"] > 0.1
    assert strerror_of_cat(volume.path / "key") == ""


def test_what_never_reaches_kms_is_told_without_a_call(site: Site, view: str) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    site.encrypt_with_aws_cli("bare.encrypted", site.secret("bare", 40))
    site.write("cut.encrypted", (site.source / "key.encrypted").read_bytes()[:100])
    site.write("README.txt", b"not ciphertext of any kind\n")
    volume = site.mount(exit_code=exit_code_of_mount(view))
    assert why(volume, "bare")["error"] == "NotBound"
    assert why(volume, "cut")["error"] == "CiphertextInvalid"
    done = volume.kmsfs("why", volume.path / "README.txt", exit_code=2)
    assert "README.txt is not served: of no known format" in done.stderr
    done = volume.kmsfs("why", volume.path, exit_code=2)
    assert "the mountpoint is a directory" in done.stderr


def test_a_locked_volume_and_a_rolled_back_file_say_so(site: Site, view: str) -> None:
    site.make_volume()
    old = site.encrypt("key", site.secret("old", 40)).read_bytes()
    ciphertext = site.encrypt("key", site.secret("new", 40))
    volume = site.mount()
    assert why(volume, "key")["version"] == 2
    ciphertext.write_bytes(old)
    volume.kmsfs("refresh", volume.path, exit_code=exit_code_of_mount(view))
    found = why(volume, "key")
    assert (found["state"], found["error"]) == ("failing", "RolledBack")
    assert "--accept-older" in found["hint"]
    # The older version was authenticated, and is not what is served.
    assert found["version"] is None
    volume.kmsfs("lock", volume.path)
    assert why(volume, "key")["state"] == "locked"
