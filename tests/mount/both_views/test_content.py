"""What was encrypted is what programs read, byte for byte and however they read it."""

import base64
import errno
import filecmp
import mmap
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.mounts import MountedVolume
from tests.support.sites import Site, StrictSite


def copies(volume: MountedVolume, directory: Path) -> list[Path]:
    """The whole mount, copied by each program that copies trees; links are followed."""
    copied, synced, unpacked = (directory / name for name in ("cp", "rsync", "tar"))
    packed = directory / "all.tar"
    subprocess.run(["cp", "-rL", f"{volume.path}/.", copied], check=True)
    subprocess.run(["rsync", "-aL", f"{volume.path}/", synced], check=True)
    subprocess.run(["tar", "chf", packed, "-C", volume.path, "."], check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="data")
    return [copied, synced, unpacked]


def files_found(volume: MountedVolume) -> set[str]:
    """What `find -L` finds of regular files, outside of the ramfs view's own layout."""
    done = subprocess.run(
        ["find", "-L", volume.path, "-name", "..*", "-prune", "-o", "-type", "f", "-printf"]
        + ["%P\\n"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.splitlines())


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


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 4097, 300_000])
def test_bound_message_has_its_true_size_before_and_after_opening(
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


def test_copying_an_unopened_bare_blob_is_exact(site: Site, tmp_path: Path) -> None:
    plaintext = site.secret("bare", 333)
    site.encrypt_with_aws_cli("bare.encrypted", plaintext)
    volume = site.mount()
    subprocess.run(["cp", volume.path / "bare", tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == plaintext


def test_programs_that_copy_get_every_byte(site: Site, tmp_path: Path) -> None:
    site.make_volume("bare")
    contents = {
        "empty": b"",
        "store": site.secret("store", 300_000),
        "sub/key": site.secret("key", 1704),
    }
    for name, plaintext in contents.items():
        site.encrypt(name, plaintext)
    contents["bare"] = site.secret("bare", 333)
    site.encrypt_with_aws_cli("bare.encrypted", contents["bare"])
    volume = site.mount()
    # In the FUSE view a bare blob's size is known from its first open on.
    (volume.path / "bare").read_bytes()
    assert files_found(volume) == set(contents)
    for place in copies(volume, tmp_path):
        for name, plaintext in contents.items():
            assert (place / name).read_bytes() == plaintext
            subprocess.run(["cmp", volume.path / name, place / name], check=True)
            assert filecmp.cmp(place / name, volume.path / name, shallow=False)
    for name, plaintext in contents.items():
        counted = subprocess.run(
            ["wc", "-c", volume.path / name], check=True, capture_output=True, text=True
        )
        assert int(counted.stdout.split()[0]) == len(plaintext)


def test_every_one_of_many_files_is_listed_and_read(strict_site: StrictSite) -> None:
    site = strict_site
    plaintext = site.secret("one of many", 60)
    blob = site.blob(plaintext)
    names = {f"many/file-{number:03}" for number in range(200)}
    for name in names:
        site.write(name + ".encrypted", blob)
    volume = site.mount()
    assert files_found(volume) == names
    assert len(volume.names("many")) == 200
    assert {(volume.path / name).read_bytes() for name in names} == {plaintext}


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


def test_shared_maps_are_possible_in_a_ramfs_only(site: Site, view: str) -> None:
    plaintext = site.secret("shared", 9000)
    site.make_volume()
    site.encrypt("shared", plaintext)
    volume = site.mount()
    with (volume.path / "shared").open("rb") as file:
        if view == "fuse":
            with pytest.raises(OSError, match="No such device") as refused:
                mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            assert refused.value.errno == errno.ENODEV
        else:
            with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as shared:
                assert shared[:] == plaintext


def test_reads_at_any_offset_give_that_part(site: Site) -> None:
    plaintext = site.secret("parts", 10_000)
    site.make_volume()
    site.encrypt("parts", plaintext)
    volume = site.mount()
    fd = os.open(volume.path / "parts", os.O_RDONLY)
    try:
        for offset, size in ((0, 1), (9_999, 10), (4_090, 20), (10_000, 5), (50_000, 5), (1, 0)):
            assert os.pread(fd, size, offset) == plaintext[offset : offset + size]
        assert os.lseek(fd, -10, os.SEEK_END) == len(plaintext) - 10
        assert os.read(fd, 100) == plaintext[-10:]
    finally:
        os.close(fd)
