"""An older ciphertext put back in place of a newer one: refused, shown, and never served."""

from pathlib import Path

import pytest

from tests.support.mounts import SEEN_S, MountedVolume, strerror_of_cat, wait_until
from tests.support.refusals import BAD_MESSAGE, refusal_of, said_of_refused
from tests.support.sites import Site


class Versions:
    """Two versions of the file `key`: the content of each, and its ciphertext."""

    def __init__(self, site: Site) -> None:
        self.old, self.new = site.secret("old", 300), site.secret("new", 400)
        self.path = site.encrypt("key", self.old)
        self.old_ciphertext = self.path.read_bytes()
        site.encrypt("key", self.new)
        self.new_ciphertext = self.path.read_bytes()

    def put(self, ciphertext: bytes) -> None:
        """Replace what is in the source, by a rename."""
        beside = self.path.with_suffix(".beside")
        beside.write_bytes(ciphertext)
        beside.rename(self.path)


@pytest.fixture
def versions(site: Site) -> Versions:
    """A volume whose source has the newer version."""
    site.make_volume()
    return Versions(site)


def wait_for(path: Path, content: bytes) -> None:
    """Wait until a file is served with this content."""

    def is_served() -> bool:
        try:
            return path.read_bytes() == content
        except OSError:
            return False

    wait_until(is_served, "its content", SEEN_S)


def wait_until_refused(volume: MountedVolume, view: str) -> None:
    """Wait until programs and `kmsfs status` say that `key` was rolled back."""
    refused = said_of_refused(view, fuse=BAD_MESSAGE), "RolledBack"
    wait_until(lambda: refusal_of(volume, "key") == refused, "it is refused", SEEN_S)


def test_an_older_version_is_refused_and_shown_until_the_newest_is_back(
    site: Site, view: str, versions: Versions
) -> None:
    other = site.secret("other", 50)
    site.encrypt("other", other)
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    versions.put(versions.old_ciphertext)
    wait_until_refused(volume, view)
    assert "hint" in volume.kmsfs("status", volume.path).output
    # Neither of its versions is held any more.
    assert (volume.status()["cached"], volume.status()["cached_bytes"]) == ([], 0)
    assert (volume.path / "other").read_bytes() == other

    versions.put(versions.new_ciphertext)
    wait_for(volume.path / "key", versions.new)
    assert volume.failing() == {}


def test_what_is_open_keeps_its_version_over_a_rollback(
    site: Site, view: str, versions: Versions
) -> None:
    volume = site.mount()
    with (volume.path / "key").open("rb", buffering=0) as opened:
        assert opened.read(10) == versions.new[:10]
        versions.put(versions.old_ciphertext)
        wait_until_refused(volume, view)
        assert versions.new[:10] + opened.read() == versions.new


def test_the_same_version_encrypted_once_more_is_served(site: Site, versions: Versions) -> None:
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    versions.path.write_bytes(versions.old_ciphertext)
    again = site.secret("again", 500)
    # Makes version 2 of version 1, as the newer one was made.
    site.encrypt("key", again)
    wait_for(volume.path / "key", again)


def test_lock_and_unlock_do_not_make_it_forget(site: Site, view: str, versions: Versions) -> None:
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    volume.kmsfs("lock", volume.path)
    versions.put(versions.old_ciphertext)
    volume.kmsfs("unlock", volume.path, exit_code=None)
    wait_until_refused(volume, view)


def test_a_new_mount_knows_of_no_newer_version(site: Site, versions: Versions) -> None:
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    volume.umount()
    versions.put(versions.old_ciphertext)
    wait_for(site.mount().path / "key", versions.old)


def test_where_the_volume_allows_it_an_older_version_is_served_and_called_weaker(
    site: Site, versions: Versions
) -> None:
    config = site.source / "kmsfs.toml"
    config.write_text(config.read_text().replace("[kms]", 'rollback = "allow"\n[kms]'))
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    versions.put(versions.old_ciphertext)
    wait_for(volume.path / "key", versions.old)
    assert any("rollback" in text for text in volume.status()["weaknesses"])


def test_files_that_are_not_bound_have_no_version_to_go_back_from(site: Site) -> None:
    old, new = site.secret("old", 40), site.secret("new", 60)
    old_blob = site.blob(old)
    site.write("bare.encrypted", site.blob(new))
    volume = site.mount()
    wait_for(volume.path / "bare", new)
    site.write("bare.encrypted", old_blob)
    wait_for(volume.path / "bare", old)
    assert strerror_of_cat(volume.path / "bare") == ""


@pytest.mark.parametrize("place", ["key", ""])
def test_refresh_accepts_an_older_version_where_it_is_told_to(
    site: Site, view: str, versions: Versions, place: str
) -> None:
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    versions.put(versions.old_ciphertext)
    wait_until_refused(volume, view)
    volume.kmsfs("refresh", volume.path / "key", exit_code={"fuse": 0, "ramfs": 1}[view])
    wait_until_refused(volume, view)

    volume.kmsfs("refresh", "--accept-older", volume.path / place)
    assert (volume.path / "key").read_bytes() == versions.old
    assert volume.failing() == {}
    # From there versions rise again, and the one accepted is what no older one may replace.
    versions.put(versions.new_ciphertext)
    wait_for(volume.path / "key", versions.new)
    versions.put(versions.old_ciphertext)
    wait_until_refused(volume, view)


def test_what_cannot_be_read_is_not_accepted(site: Site, view: str, versions: Versions) -> None:
    volume = site.mount()
    wait_for(volume.path / "key", versions.new)
    cut = versions.old_ciphertext[:-1]
    versions.put(cut)
    refused = said_of_refused(view, fuse=BAD_MESSAGE), "CiphertextInvalid"
    wait_until(lambda: refusal_of(volume, "key") == refused, "it is refused", SEEN_S)
    done = volume.kmsfs("refresh", "--accept-older", volume.path / "key", exit_code=1)
    assert "kmsfs: error: key: CiphertextInvalid: " in done.stderr
    versions.put(versions.old_ciphertext)
    wait_until_refused(volume, view)
