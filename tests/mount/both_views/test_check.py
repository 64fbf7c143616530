"""`kmsfs check` of a mountpoint: what is mounted there, and what its files hold."""

import json
from datetime import timedelta
from typing import Any

from tests.support.certificates import certificate_pem, key_pem, new_key
from tests.support.mounts import MountedVolume
from tests.support.sites import StrictSite


def problems(volume: MountedVolume, *arguments: str, exit_code: int) -> dict[str, str]:
    """What `check --json` finds wrong, by file or key."""
    done = volume.kmsfs("check", volume.path, "--json", *arguments, exit_code=exit_code)
    found: dict[str, Any] = json.loads(done.output)
    items = [*found["files"], *found["keys"], *(found["content"] or ())]
    return {
        item.get("path") or item["key_id"]: item["problem"]["error"]
        for item in items
        if item["problem"] is not None
    }


def test_source_and_keys_are_those_of_the_mount(strict_site: StrictSite) -> None:
    """Without a kmsfs.toml nothing but the mount tells its keys."""
    site = strict_site
    site.write("blob.kms", site.blob(site.secret("blob", 40)))
    volume = site.mount()
    done = volume.kmsfs("check", volume.path)
    assert done.output.splitlines() == [
        f"key {site.key_arn}: would decrypt",
        "blob: good, kms-blob, unbound, about 40 bytes, 0 h old",
        "1 file, 1 key: all good",
    ]
    site.kms.deny(site.kms.admin, "Decrypt", site.key)
    found = problems(volume, "--decrypt", exit_code=1)
    assert found == {"blob": "KeyAccessDenied", site.key_arn: "KeyAccessDenied"}


def test_content_is_read_through_the_mount_and_not_shown(strict_site: StrictSite) -> None:
    site = strict_site
    site.make_volume()
    key, other = new_key(), new_key()
    marked = site.secret("before the block", 60) + b"\n"
    site.encrypt("good/tls.key", marked + key_pem(key))
    site.encrypt("good/tls.crt", marked + certificate_pem(key, ends=timedelta(days=20)))
    site.encrypt("bad/tls.key", marked + key_pem(key))
    site.encrypt("bad/tls.crt", marked + certificate_pem(other))
    site.encrypt("old.pem", marked + certificate_pem(other, ends=timedelta(days=-1)))
    site.encrypt("password", marked)
    volume = site.mount()

    assert problems(volume, exit_code=0) == {}
    found = problems(volume, "--content", exit_code=1)
    assert found == {"bad/tls.key": "KeyMismatch", "old.pem": "Expired"}
    found = problems(volume, "--content", "--expires-within", "30", exit_code=1)
    assert found["good/tls.crt"] == "ExpiresSoon"

    done = volume.kmsfs("check", volume.path, "--content", exit_code=1)
    assert "content of good/tls.key: 1 private key\n" in done.output
    assert "password" not in done.output.partition("content of")[2]
    assert done.stderr.splitlines()[0] == (
        "kmsfs: error: bad/tls.key: its private key is not that of the certificate in tls.crt"
    )


def test_locked_mount_has_no_content(strict_site: StrictSite, view: str) -> None:
    site = strict_site
    site.make_volume()
    site.encrypt("key", key_pem(new_key()))
    volume = site.mount()
    volume.kmsfs("lock", volume.path)
    absent = {"fuse": "ENOKEY", "ramfs": "ENOENT"}[view]
    assert problems(volume, "--content", exit_code=1) == {"key": absent}
    assert problems(volume, "--decrypt", exit_code=0) == {}
