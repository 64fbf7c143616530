"""Extended attributes in the FUSE view: what is known of a file, without asking KMS for it."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.mounts import strerror_of_cat, wait_until
from tests.support.sites import Site, StrictSite

_PREFIX = "user.kmsfs."

NO_DATA = "No data available"


def attributes(path: Path) -> dict[str, str]:
    """All of a file's attributes, by what follows the prefix."""
    names = os.listxattr(path)
    assert all(name.startswith(_PREFIX) for name in names)
    return {name.removeprefix(_PREFIX): os.getxattr(path, name).decode() for name in names}


def test_before_a_decryption_only_the_format_is_known_and_kms_is_not_asked(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    volume = site.mount()
    site.kms.forget_calls()
    path = volume.path / "key"
    assert attributes(path) == {"format": "encryption-sdk"}
    for name in ("version", "decrypted_at", "key_arn", "stale", "age_s", "no such"):
        with pytest.raises(OSError, match=NO_DATA):
            os.getxattr(path, _PREFIX + name)
    assert site.kms.calls("Decrypt") == []


def test_after_a_decryption_everything_is_known_of_it(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    for _ in range(2):
        site.encrypt("key", site.secret("key", 40))
    volume = site.mount()
    path = volume.path / "key"
    before = datetime.now(UTC).replace(microsecond=0)
    path.read_bytes()
    known = attributes(path)
    age_s = float(known.pop("age_s"))
    at = datetime.strptime(known.pop("decrypted_at"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert before <= at <= datetime.now(UTC)
    assert 0 <= age_s <= (datetime.now(UTC) - before).total_seconds()
    assert known == {
        "format": "encryption-sdk",
        "key_arn": site.key_arn,
        "stale": "0",
        "version": "2",
    }
    # The age is that of the decryption, whoever opens the file since.
    path.read_bytes()
    assert float(attributes(path)["age_s"]) > age_s
    assert len(site.kms.calls("Decrypt")) == 1


def test_a_new_version_has_none_of_what_was_known_of_the_old_one(site: Site) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("old", 40))
    volume = site.mount()
    path = volume.path / "key"
    path.read_bytes()
    assert attributes(path)["version"] == "1"
    site.encrypt("key", site.secret("new", 60))
    wait_until(lambda: "version" not in attributes(path), "the new one is seen")
    path.read_bytes()
    assert attributes(path)["version"] == "2"


def test_a_bare_blob_has_no_version(strict_site: StrictSite) -> None:
    site = strict_site
    site.write("bare.encrypted", site.blob(site.secret("bare", 40)))
    volume = site.mount()
    path = volume.path / "bare"
    path.read_bytes()
    known = attributes(path)
    assert (known["format"], known["key_arn"]) == ("kms-blob", site.key_arn)
    assert "version" not in known


def test_a_file_served_stale_says_so_and_its_age_counts_from_the_last_success(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    site.make_volume()
    site.append_config("deadline_s = 1.5\n[cache]\nttl_s = 0.1\nstale_s = 600\n")
    site.encrypt("key", site.secret("key", 40))
    volume = site.mount()
    path = volume.path / "key"
    path.read_bytes()
    site.kms.fail("KMSInternalException")
    wait_until(lambda: attributes(path)["stale"] == "1", "its time is over")
    age_s = float(attributes(path)["age_s"])
    assert strerror_of_cat(path) == ""
    known = attributes(path)
    assert known["stale"] == "1"
    assert float(known["age_s"]) > age_s > 0.1
    site.kms.heal()
    path.read_bytes()
    assert float(attributes(path)["age_s"]) < age_s + 1.5


def test_directories_and_attributes_of_others_have_nothing(site: Site) -> None:
    site.make_volume()
    site.encrypt("sub/key", site.secret("key", 40))
    volume = site.mount()
    assert os.listxattr(volume.path) == []
    assert os.listxattr(volume.path / "sub") == []
    for name in ("user.other", "security.capability", "security.selinux"):
        with pytest.raises(OSError, match=NO_DATA):
            os.getxattr(volume.path / "sub/key", name)
    with pytest.raises(OSError, match="Read-only file system"):
        os.setxattr(volume.path / "sub/key", "user.kmsfs.version", b"9")


def test_who_may_not_read_a_file_may_not_read_its_attributes(
    site: Site, public_directory: Path
) -> None:
    site.make_volume()
    site.encrypt("key", site.secret("key", 40))
    volume = site.mount(path=public_directory / "mnt")
    (volume.path / "key").read_bytes()
    script = "import os, sys; os.getxattr(sys.argv[1], 'user.kmsfs.key_arn')"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script, volume.path / "key"],
        user="nobody",
        group="nogroup",
        extra_groups=[],
        env={"LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError" in done.stderr
