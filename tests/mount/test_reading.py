"""Ordinary programs read through a real mount what the AWS CLI and kmsfs encrypted."""

import base64
import filecmp
import mmap
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.sites import Site, StrictSite


def test_file_encrypted_by_aws_cli_is_read_as_an_ordinary_file(site: Site) -> None:
    plaintext = site.secret("password", 40)
    site.encrypt_with_aws_cli("db-password.encrypted", plaintext)
    volume = site.mount()
    assert (volume.path / "db-password").read_bytes() == plaintext


def test_blob_left_in_base64_is_read(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("base64", 100)
    site.write("token.encrypted", base64.encodebytes(site.blob(plaintext)))
    volume = site.mount()
    assert (volume.path / "token").read_bytes() == plaintext


def test_real_shaped_blob_needs_no_suffix(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("plain name", 64)
    site.write("token", site.blob(plaintext))
    volume = site.mount()
    assert (volume.path / "token").read_bytes() == plaintext


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 4097, 300_000])
def test_encryption_sdk_message_has_its_true_size_before_and_after_opening(
    site: Site, size_bytes: int
) -> None:
    plaintext = site.secret("store", size_bytes)
    site.make_volume()
    site.encrypt("store.p12", plaintext)
    volume = site.mount()
    path = volume.path / "store.p12"
    assert path.stat().st_size == size_bytes
    assert path.read_bytes() == plaintext
    assert path.stat().st_size == size_bytes


def test_size_of_a_bare_blob_is_exact_from_the_first_open_on(site: Site) -> None:
    plaintext = site.secret("bare", 777)
    site.encrypt_with_aws_cli("bare.encrypted", plaintext)
    volume = site.mount()
    path = volume.path / "bare"
    with path.open("rb") as file:
        assert os.fstat(file.fileno()).st_size == len(plaintext)
    assert path.stat().st_size == len(plaintext)


def test_names_lose_their_suffix_and_unknown_files_are_not_served(site: Site) -> None:
    site.make_volume("**")
    site.encrypt_with_aws_cli("one.encrypted", site.secret("one", 50))
    site.encrypt_with_aws_cli("two.kms", site.secret("two", 50))
    site.write("README.txt", b"not ciphertext of any kind\n")
    (site.source / "empty-directory").mkdir()
    volume = site.mount()
    assert sorted(os.listdir(volume.path)) == ["empty-directory", "one", "two"]
    status = volume.status()
    assert [item["path"] for item in status["ignored"]] == ["README.txt"]
    assert status["served"] == 2


def test_metadata_never_calls_kms(site: Site) -> None:
    for index in range(5):
        site.encrypt_with_aws_cli(f"file-{index}.encrypted", site.secret("meta", 50))
    volume = site.mount(env={**site.env, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    subprocess.run(["ls", "-lR", volume.path], check=True, capture_output=True)
    subprocess.run(["find", volume.path, "-size", "+0"], check=True, capture_output=True)
    subprocess.run(["df", volume.path], check=True, capture_output=True)
    subprocess.run(["stat", volume.path / "file-0"], check=True, capture_output=True)
    status = volume.status()
    assert status["failing"] == []
    assert status["worker_pids"] == []


def test_programs_that_copy_get_every_byte(site: Site, tmp_path: Path) -> None:
    site.make_volume("bare")
    contents = {"store": site.secret("store", 300_000), "sub/key": site.secret("key", 1704)}
    for name, plaintext in contents.items():
        site.encrypt(name, plaintext)
    contents["bare"] = site.secret("bare", 333)
    site.encrypt_with_aws_cli("bare.encrypted", contents["bare"])
    volume = site.mount()
    # A bare blob's size is known from its first open on.
    (volume.path / "bare").read_bytes()
    copied, synced, packed = tmp_path / "cp", tmp_path / "rsync", tmp_path / "all.tar"
    subprocess.run(["cp", "-r", f"{volume.path}/.", copied], check=True)
    subprocess.run(["rsync", "-a", f"{volume.path}/", synced], check=True)
    subprocess.run(["tar", "cf", packed, "-C", volume.path, "."], check=True)
    unpacked = tmp_path / "tar"
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="data")
    for name, plaintext in contents.items():
        for place in (copied, synced, unpacked):
            assert (place / name).read_bytes() == plaintext
        subprocess.run(["cmp", volume.path / name, copied / name], check=True)
        counted = subprocess.run(
            ["wc", "-c", volume.path / name], check=True, capture_output=True, text=True
        )
        assert int(counted.stdout.split()[0]) == len(plaintext)
    assert filecmp.cmp(copied / "store", volume.path / "store", shallow=False)


def test_copying_an_unopened_bare_blob_is_exact(site: Site, tmp_path: Path) -> None:
    plaintext = site.secret("bare", 333)
    site.encrypt_with_aws_cli("bare.encrypted", plaintext)
    volume = site.mount()
    subprocess.run(["cp", volume.path / "bare", tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == plaintext


def test_sendfile_and_private_maps_give_the_content(site: Site, tmp_path: Path) -> None:
    plaintext = site.secret("mapped", 200_000)
    site.make_volume()
    site.encrypt("mapped", plaintext)
    volume = site.mount()
    with (volume.path / "mapped").open("rb") as file:
        with (tmp_path / "sent").open("wb") as target:
            sent = 0
            while sent < len(plaintext):
                sent += os.sendfile(target.fileno(), file.fileno(), sent, len(plaintext) - sent)
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as view:
            assert view[:] == plaintext
    assert (tmp_path / "sent").read_bytes() == plaintext


def test_reads_at_any_offset_give_that_part(site: Site) -> None:
    plaintext = site.secret("parts", 10_000)
    site.make_volume()
    site.encrypt("parts", plaintext)
    volume = site.mount()
    fd = os.open(volume.path / "parts", os.O_RDONLY)
    try:
        for offset, size in ((0, 1), (9_999, 10), (4_090, 20), (10_000, 5), (50_000, 5), (1, 0)):
            assert os.pread(fd, size, offset) == plaintext[offset : offset + size]
    finally:
        os.close(fd)


def test_the_mount_is_read_only(site: Site) -> None:
    site.encrypt_with_aws_cli("file.encrypted", site.secret("ro", 10))
    volume = site.mount()
    with pytest.raises(OSError, match="Read-only file system"):
        (volume.path / "new").write_text("x")
    with pytest.raises(OSError, match="Read-only file system"):
        (volume.path / "file").open("r+b")
    with pytest.raises(OSError, match="Read-only file system"):
        (volume.path / "file").unlink()
    assert volume.mount is not None
    options = subprocess.run(
        ["findmnt", "-no", "OPTIONS", volume.path], check=True, capture_output=True, text=True
    )
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.stdout.strip().split(","))


def test_links_are_followed_inside_the_source_only(site: Site, tmp_path: Path) -> None:
    plaintext = site.secret("linked", 64)
    site.encrypt_with_aws_cli("real.encrypted", plaintext)
    outside = tmp_path / "outside.encrypted"
    outside.write_bytes((site.source / "real.encrypted").read_bytes())
    (site.source / "inside-link.encrypted").symlink_to("real.encrypted")
    (site.source / "outside-link.encrypted").symlink_to(outside)
    (site.source / "loop").symlink_to(".")
    volume = site.mount()
    assert sorted(os.listdir(volume.path)) == ["inside-link", "real"]
    assert (volume.path / "inside-link").read_bytes() == plaintext
    assert not (volume.path / "outside-link").exists()
    assert not (volume.path / "loop").exists()


def test_inode_numbers_are_the_same_after_a_restart(site: Site) -> None:
    site.make_volume()
    site.encrypt("a", site.secret("a", 20))
    site.encrypt("sub/b", site.secret("b", 20))
    volume = site.mount()
    before = {name: (volume.path / name).stat().st_ino for name in ("a", "sub", "sub/b")}
    volume.umount()
    volume = site.mount()
    assert {name: (volume.path / name).stat().st_ino for name in before} == before
    assert len(set(before.values())) == 3


def test_files_belong_to_whom_options_and_rules_say(site: Site) -> None:
    site.make_volume()
    site.append_config('[[rule]]\nmatch = "nginx/*"\ngroup = "www-data"\nmode = "0440"\n')
    site.append_config('[[rule]]\nmatch = "**/*.pub"\nmode = "0444"\n')
    for name in ("nginx/ssl.pem", "other", "deep/er/key.pub"):
        site.encrypt(name, site.secret(name, 30))
    volume = site.mount("--owner", "daemon", "--mode", "0600", "--dir-mode", "0755")
    shown = {
        name: ((volume.path / name).stat().st_mode & 0o7777, (volume.path / name).owner())
        for name in ("nginx/ssl.pem", "other", "deep/er/key.pub", "nginx")
    }
    assert shown == {
        "nginx/ssl.pem": (0o440, "daemon"),
        "other": (0o600, "daemon"),
        "deep/er/key.pub": (0o444, "daemon"),
        "nginx": (0o755, "daemon"),
    }
    assert (volume.path / "nginx/ssl.pem").group() == "www-data"


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
