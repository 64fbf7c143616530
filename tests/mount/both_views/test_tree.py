"""Names, attributes and permissions: what a mount looks like from outside."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import SEEN_S, wait_until
from tests.support.refusals import (
    NOT_UNIQUE,
    exit_code_of_mount,
    refusal_of,
    said_of_refused,
)
from tests.support.sites import Site, StrictSite


def test_names_lose_their_suffix_and_unknown_files_are_not_served(site: Site) -> None:
    site.make_volume("**")
    site.encrypt_with_aws_cli("one.encrypted", site.secret("one", 50))
    site.encrypt_with_aws_cli("two.kms", site.secret("two", 50))
    site.write("README.txt", b"not ciphertext of any kind\n")
    (site.source / "empty-directory").mkdir()
    volume = site.mount()
    assert volume.names() == ["empty-directory", "one", "two"]
    assert volume.names("empty-directory") == []
    assert not (volume.path / "one.encrypted").exists()
    assert not (volume.path / "README.txt").exists()
    status = volume.status()
    assert [item["path"] for item in status["ignored"]] == ["README.txt"]
    assert status["served"] == 2


def test_subdirectories_are_served_at_any_depth(site: Site) -> None:
    site.make_volume()
    contents = {name: site.secret(name, 40) for name in ("a/b/c/d/deep", "a/b/beside", "top")}
    for name, plaintext in contents.items():
        site.encrypt(name, plaintext)
    (site.source / "a/empty/inner").mkdir(parents=True)
    volume = site.mount()
    assert volume.names() == ["a", "top"]
    assert volume.names("a") == ["b", "empty"]
    assert volume.names("a/empty") == ["inner"]
    assert {name: (volume.path / name).read_bytes() for name in contents} == contents


def test_names_of_any_characters_are_served(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("name", 40)
    blob = site.blob(plaintext)
    names = sorted(["with space", "line\nbreak", "schlüssel", "鍵", ".hidden", "-n", "x" * 245])
    for name in names:
        site.write(f"{name}.encrypted", blob)
    volume = site.mount()
    assert volume.names() == names
    assert {(volume.path / name).read_bytes() for name in names} == {plaintext}


def test_a_name_that_is_not_utf_8_is_not_served_and_said(strict_site: StrictSite) -> None:
    site = strict_site
    blob = site.blob(site.secret("name", 40))
    site.write("good.encrypted", blob)
    site.write(os.fsdecode(b"bad-\xff.encrypted"), blob)
    volume = site.mount()
    assert volume.names() == ["good"]
    assert [item["reason"] for item in volume.status()["ignored"]] == ["its name is not UTF-8"]


def test_names_that_begin_with_two_dots_are_not_served_at_the_top(site: Site) -> None:
    site.make_volume()
    plaintext = site.secret("dots", 40)
    for name in ("..data/key", "..hidden", "sub/..fine", "good"):
        site.encrypt(name, plaintext)
    (site.source / "..state").mkdir()
    volume = site.mount()
    for name in ("sub/..fine", "good"):
        assert (volume.path / name).read_bytes() == plaintext
    for name in ("..data/key", "..hidden"):
        assert not (volume.path / name).exists()
    reasons = {item["path"]: item["reason"] for item in volume.status()["ignored"]}
    assert set(reasons) == {"..data", "..hidden.encrypted", "..state"}
    assert set(reasons.values()) == {"names that begin with two dots are not served at the top"}


def test_a_source_in_the_layout_of_the_atomic_writer_is_served_once(site: Site) -> None:
    site.make_volume("**")
    plaintext = site.secret("mounted secret", 40)
    site.encrypt_with_aws_cli("..2026_11_24/key.encrypted", plaintext)
    (site.source / "..data").symlink_to("..2026_11_24")
    (site.source / "key.encrypted").symlink_to("..data/key.encrypted")
    volume = site.mount()
    assert volume.names() == ["key"]
    assert (volume.path / "key").read_bytes() == plaintext
    assert volume.status()["served"] == 1


def test_links_are_followed_inside_the_source_only(site: Site, tmp_path: Path) -> None:
    plaintext = site.secret("linked", 64)
    site.encrypt_with_aws_cli("real.encrypted", plaintext)
    outside = tmp_path / "outside.encrypted"
    outside.write_bytes((site.source / "real.encrypted").read_bytes())
    (site.source / "inside-link.encrypted").symlink_to("real.encrypted")
    (site.source / "outside-link.encrypted").symlink_to(outside)
    (site.source / "loop").symlink_to(".")
    (site.source / "outside-directory").symlink_to(tmp_path)
    volume = site.mount()
    assert volume.names() == ["inside-link", "real"]
    assert (volume.path / "inside-link").read_bytes() == plaintext
    assert not (volume.path / "outside-link").exists()
    assert not (volume.path / "outside-directory").exists()
    assert not (volume.path / "loop").exists()


def test_a_link_to_a_directory_inside_the_source_is_served_as_a_directory(
    strict_site: StrictSite,
) -> None:
    site = strict_site
    plaintext = site.secret("linked", 64)
    site.write("real/key.encrypted", site.blob(plaintext))
    (site.source / "linked").symlink_to("real")
    volume = site.mount()
    assert volume.names() == ["linked", "real"]
    assert (volume.path / "linked/key").read_bytes() == plaintext


def test_two_sources_for_one_name_are_refused_until_one_is_gone(
    strict_site: StrictSite, view: str
) -> None:
    site = strict_site
    site.write("other.encrypted", site.blob(site.secret("other", 40)))
    plaintext = site.secret("twice", 40)
    site.write("twice.encrypted", site.blob(plaintext))
    site.write("twice.kms", site.blob(plaintext))
    volume = site.mount(exit_code=exit_code_of_mount(view))
    assert volume.names() == {"fuse": ["other", "twice"], "ramfs": ["other"]}[view]
    said = said_of_refused(view, fuse=NOT_UNIQUE)
    assert refusal_of(volume, "twice") == (said, "NameConflict")
    (site.source / "twice.kms").unlink()
    wait_until(lambda: refusal_of(volume, "twice") == ("", ""), "it is served", SEEN_S)
    assert (volume.path / "twice").read_bytes() == plaintext


def test_the_mount_is_read_only(site: Site) -> None:
    site.make_volume()
    site.encrypt("file", site.secret("file", 20))
    site.encrypt("sub/file", site.secret("sub/file", 20))
    volume = site.mount()
    file, inner, new = volume.path / "file", volume.path / "sub/file", volume.path / "new"
    attempts: list[Callable[[], object]] = [
        new.touch,
        (volume.path / "sub/new").touch,
        new.mkdir,
        lambda: file.open("r+b"),
        file.unlink,
        inner.unlink,
        lambda: file.rename(new),
        lambda: inner.chmod(0o644),
        lambda: os.utime(file),
        lambda: os.truncate(file, 0),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="Read-only file system"):
            attempt()
    options = subprocess.run(
        ["findmnt", "-no", "OPTIONS", volume.path], check=True, capture_output=True, text=True
    )
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.stdout.strip().split(","))


def test_files_belong_to_whom_options_and_rules_say(site: Site) -> None:
    site.make_volume()
    site.append_config('[[rule]]\nmatch = "nginx/*"\ngroup = "www-data"\nmode = "0440"\n')
    site.append_config('[[rule]]\nmatch = "**/*.pub"\nmode = "0444"\n')
    for name in ("nginx/ssl.pem", "other", "deep/er/key.pub"):
        site.encrypt(name, site.secret(name, 30))
    options = ("--owner", "daemon", "--group", "bin", "--mode", "0600", "--dir-mode", "0750")
    volume = site.mount(*options)
    names = ("nginx/ssl.pem", "other", "deep/er/key.pub", ".", "nginx", "deep/er")
    paths = {name: volume.path / name for name in names}
    shown = {
        name: (path.stat().st_mode & 0o7777, path.owner(), path.group())
        for name, path in paths.items()
    }
    assert shown == {
        "nginx/ssl.pem": (0o440, "daemon", "www-data"),
        "other": (0o600, "daemon", "bin"),
        "deep/er/key.pub": (0o444, "daemon", "bin"),
        ".": (0o750, "daemon", "bin"),
        "nginx": (0o750, "daemon", "bin"),
        "deep/er": (0o750, "daemon", "bin"),
    }


def test_files_are_their_owners_to_read_where_nothing_is_said(site: Site) -> None:
    site.make_volume()
    site.encrypt("sub/key", site.secret("key", 30))
    volume = site.mount()
    modes = {name: (volume.path / name).stat().st_mode & 0o7777 for name in (".", "sub", "sub/key")}
    assert modes == {".": 0o555, "sub": 0o555, "sub/key": 0o400}
    assert (volume.path / "sub/key").stat().st_uid == os.geteuid()


@pytest.mark.needs_root
def test_another_user_reads_what_its_rule_allows_and_nothing_else(
    site: Site, public_directory: Path
) -> None:
    site.make_volume()
    site.append_config('[[rule]]\nmatch = "web/*"\ngroup = "www-data"\nmode = "0440"\n')
    allowed = site.secret("web", 30)
    site.encrypt("web/key", allowed)
    site.encrypt("root-only", site.secret("root", 30))
    volume = site.mount(path=public_directory / "mnt")
    assert site.read_as("www-data", volume.path / "web/key") == allowed
    with pytest.raises(PermissionError):
        site.read_as("www-data", volume.path / "root-only")
    with pytest.raises(PermissionError):
        site.read_as("nobody", volume.path / "web/key")


@pytest.mark.needs_root
def test_directories_are_closed_to_others_where_their_mode_says_so(
    site: Site, public_directory: Path
) -> None:
    site.make_volume()
    site.encrypt("web/key", site.secret("web", 30))
    volume = site.mount("--mode", "0444", "--dir-mode", "0500", path=public_directory / "mnt")
    with pytest.raises(PermissionError):
        site.read_as("www-data", volume.path / "web/key")


def test_a_file_has_the_modification_time_of_its_ciphertext(site: Site) -> None:
    site.make_volume()
    ciphertext = site.encrypt("sub/key", site.secret("key", 30))
    mtime_ns = 1_500_000_000_123_456_789
    os.utime(ciphertext, ns=(mtime_ns, mtime_ns))
    volume = site.mount()
    path = volume.path / "sub/key"
    assert path.stat().st_mtime_ns == mtime_ns
    site.encrypt("sub/key", site.secret("newer", 30))
    newer_ns = ciphertext.stat().st_mtime_ns
    wait_until(lambda: path.stat().st_mtime_ns == newer_ns, "the time of the new one", SEEN_S)


def test_status_says_what_is_mounted_how(site: Site, view: str) -> None:
    site.make_volume("bare*")
    site.encrypt("one", site.secret("one", 5000))
    site.encrypt_with_aws_cli("bare.encrypted", site.secret("bare", 50))
    volume = site.mount()
    for name in ("one", "bare"):
        (volume.path / name).read_bytes()
    status = volume.status()
    assert (status["mountpoint"], status["source"]) == (str(volume.path), str(site.source))
    assert (status["view"], status["view_reason"], status["volume"]) == (view, "", "web")
    assert (status["served"], status["locked"], status["failing"]) == (2, False, [])
    assert (status["unbound"], status["ignored"]) == (["bare"], [])
    cached = {entry["path"] for entry in status["cached"]}
    if view == "fuse":
        assert (cached, status["ram"]) == ({"one", "bare"}, None)
    else:
        # In the ramfs they need no memory of kmsfs.
        assert (cached, status["cached_bytes"]) == (set(), 0)
        ram = status["ram"]
        assert (ram["kind"], ram["swappable"], ram["problem"]) == ("ramfs", False, "")
        assert (ram["files"], ram["size_bytes"]) == (2, 3 * 4096)
        assert (ram["stale"], ram["held"]) == ([], [])
    shown = volume.kmsfs("status", volume.path).output
    assert str(site.source) in shown
