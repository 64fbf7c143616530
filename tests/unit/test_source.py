"""The source tree on a real disk: what is served under which name, and what never is."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.errors import SourceMissing, SourceUnreadable
from kmsfs.formats.detect import Format
from kmsfs.store.source import Source, SourceDirectory, SourceFile
from tests.support import forked
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.process_facts import open_fds
from tests.support.sdk_messages import sdk_message

BLOB = LocalKeys().encrypt(b"a password", key_id=key_arn(1), encryption_context={}).ciphertext


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The source's directory."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def source(root: Path) -> Iterator[Source]:
    """The source; whatever a test does with it, no descriptor stays open."""
    before = open_fds()
    found = Source(str(root))
    yield found
    found.close()
    assert open_fds() == before


def served(source: Source, directory: str = "") -> dict[str, str]:
    """Served paths of a directory, each with its ciphertext's path or `/`."""
    return {
        node.path: node.source_path if isinstance(node, SourceFile) else "/"
        for node in source.list_directory(directory)
    }


def file_at(source: Source, path: str) -> SourceFile:
    """The file served at a path."""
    directory, _, name = path.rpartition("/")
    node = source.lookup(directory, name)
    assert isinstance(node, SourceFile)
    return node


@pytest.mark.parametrize(
    ("file_name", "served_name"),
    [
        ("ssl.pem.encrypted", "ssl.pem"),
        ("ssl.pem.kms", "ssl.pem"),
        ("ssl.pem", "ssl.pem"),
        ("a.kms.encrypted", "a.kms"),
        (".kms", ".kms"),
        (".encrypted", ".encrypted"),
        (".hidden.kms", ".hidden"),
        ("ümläut.kms", "ümläut"),
        ("with space\nand line.kms", "with space\nand line"),
    ],
)
def test_a_ciphertext_is_served_and_found_under_its_name_without_suffix(
    source: Source, root: Path, file_name: str, served_name: str
) -> None:
    (root / file_name).write_bytes(BLOB)
    assert served(source) == {served_name: file_name}
    node = file_at(source, served_name)
    assert (node.source_path, node.format) == (file_name, Format.KMS_BLOB)
    if file_name != served_name:
        assert source.lookup("", file_name) is None


def test_bytes_of_no_known_format_are_served_under_a_suffix_only(
    source: Source, root: Path
) -> None:
    (root / "unknown.kms").write_bytes(b"x" * 6144)
    (root / "too-long.kms").write_bytes(b"x" * 6145)
    (root / "plain.txt").write_bytes(b"no ciphertext")
    assert served(source) == {"unknown": "unknown.kms"}
    assert source.lookup("", "plain.txt") is None
    assert dict(source.survey().ignored) == {
        "plain.txt": "of no known format",
        "too-long.kms": "of no known format",
    }


def test_two_ciphertexts_for_one_name_are_told_as_rivals(source: Source, root: Path) -> None:
    for name in ("key", "key.kms", "key.encrypted"):
        (root / name).write_bytes(BLOB)
    for node in (file_at(source, "key"), source.list_directory("")[0], source.survey().files[0]):
        assert isinstance(node, SourceFile)
        assert (node.source_path, node.rivals) == ("key", ("key.encrypted", "key.kms"))
    assert len(source.list_directory("")) == 1
    assert source.survey().ignored == ()


def test_a_directory_goes_before_a_file_of_its_name(source: Source, root: Path) -> None:
    (root / "name").mkdir()
    (root / "name.kms").write_bytes(BLOB)
    assert served(source) == {"name": "/"}
    assert isinstance(source.lookup("", "name"), SourceDirectory)
    assert source.survey().ignored == (
        ("name.kms", "a directory has the name it would be served under"),
    )


@pytest.mark.parametrize("name", ["plain", "with.kms", "with.encrypted"])
def test_a_directory_is_found_under_the_name_it_is_listed_by(
    source: Source, root: Path, name: str
) -> None:
    (root / name).mkdir()
    (root / name / "key.kms").write_bytes(BLOB)
    assert served(source) == {name: "/"}
    assert source.lookup("", name) == source.directory(name)
    assert source.lookup("", "with") is None
    assert served(source, name) == {f"{name}/key": f"{name}/key.kms"}
    assert source.lookup(name, "key") == source.list_directory(name)[0]


def test_kmsfs_toml_is_never_served(source: Source, root: Path) -> None:
    (root / "kmsfs.toml").write_text("")
    assert served(source) == {}
    assert source.lookup("", "kmsfs.toml") is None
    assert source.survey().ignored == ()


# --- links and what is no file --------------------------------------------------------------------


def test_links_are_followed_inside_the_source_only(source: Source, root: Path) -> None:
    outside = root.parent / "outside.kms"
    outside.write_bytes(BLOB)
    (root / "sub").mkdir()
    (root / "sub" / "real.kms").write_bytes(BLOB)
    (root / "link.kms").symlink_to("sub/real.kms")
    (root / "sub" / "up.kms").symlink_to("../sub/real.kms")
    (root / "out.kms").symlink_to("../outside.kms")
    (root / "absolute.kms").symlink_to(outside)
    (root / "absolute-inside.kms").symlink_to(root / "sub" / "real.kms")
    (root / "dangling.kms").symlink_to("nowhere")
    (root / "self.kms").symlink_to("self.kms")
    (root / "proc.kms").symlink_to("/proc/self/exe")
    assert served(source) == {"link": "link.kms", "sub": "/"}
    assert served(source, "sub") == {"sub/real": "sub/real.kms", "sub/up": "sub/up.kms"}
    reasons = dict(source.survey().ignored)
    assert set(reasons) == {
        "out.kms",
        "absolute.kms",
        "absolute-inside.kms",
        "dangling.kms",
        "self.kms",
        "proc.kms",
    }
    assert all(reason.startswith("cannot be opened: ") for reason in reasons.values())
    for path in ("out.kms", "absolute.kms", "dangling.kms", "self.kms", "../outside.kms"):
        with pytest.raises(SourceMissing):
            source.open_ciphertext(path)


def test_a_link_that_leads_back_does_not_end_in_a_circle(source: Source, root: Path) -> None:
    (root / "a").mkdir()
    (root / "b").mkdir()
    (root / "a" / "key.kms").write_bytes(BLOB)
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    survey = source.survey()
    assert {file.path for file in survey.files} == {"a/key", "b/a/key"}
    assert {path for path, _ in survey.ignored} == {
        "a/up",
        "a/self",
        "a/b/a",
        "b/a/up",
        "b/a/self",
        "b/a/b",
    }
    assert {reason for _, reason in survey.ignored} == {
        "a link that leads back to a directory above"
    }
    assert source.lookup("a", "up") is None


def test_what_is_no_file_is_neither_opened_nor_served(source: Source, root: Path) -> None:
    os.mkfifo(root / "fifo.kms")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "sock.kms"))
    if os.geteuid() == 0:
        os.mknod(root / "device.kms", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    assert served(source) == {}
    survey = source.survey()
    assert {reason for _, reason in survey.ignored} == {"not a regular file"}
    assert len(survey.ignored) == len(os.listdir(root))
    with pytest.raises(SourceMissing, match="not a regular file"):
        source.open_ciphertext("fifo.kms")


def test_a_name_that_is_not_utf_8_is_not_served(source: Source, root: Path) -> None:
    (root / os.fsdecode(b"\xff.kms")).write_bytes(BLOB)
    assert served(source) == {}
    assert source.survey().ignored == ((os.fsdecode(b"\xff.kms"), "its name is not UTF-8"),)


def test_what_may_not_be_read_is_told_from_what_is_unknown(root: Path) -> None:
    (root / "secret.kms").write_bytes(BLOB)
    (root / "secret.kms").chmod(0)
    (root / "closed").mkdir(mode=0o700)
    (root / "closed").chmod(0)
    for directory in (root, *list(root.parents)[:-2]):
        directory.chmod(directory.stat().st_mode | 0o055)

    def check() -> bool:
        source = Source(str(root))
        forked.become_nobody()
        assert served(source) == {"closed": "/"}
        assert dict(source.survey().ignored) == {
            "secret.kms": "cannot be opened: Permission denied",
            "closed": "closed: Permission denied",
        }
        with pytest.raises(SourceUnreadable, match="Permission denied"):
            source.open_ciphertext("secret.kms")
        return True

    assert forked.holds(check)
    (root / "closed").chmod(0o700)


def test_a_source_that_is_missing_or_no_directory_is_told(root: Path) -> None:
    with pytest.raises(SourceMissing, match="No such file"):
        Source(str(root / "missing"))
    (root / "file").write_bytes(b"")
    with pytest.raises(SourceMissing, match="Not a directory"):
        Source(str(root / "file"))


def test_what_is_gone_is_told(source: Source, root: Path) -> None:
    assert source.directory("nowhere") is None
    assert source.lookup("nowhere", "key") is None
    with pytest.raises(SourceMissing):
        source.list_directory("nowhere")
    with pytest.raises(SourceMissing):
        source.open_ciphertext("nowhere")
    root.rmdir()
    assert source.lookup("", "key") is None


def test_a_name_too_long_for_a_suffix_is_not_found(source: Source) -> None:
    assert source.lookup("", "n" * 255) is None


# --- sizes, versions, changes ---------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 4097, 100_000])
def test_the_size_of_a_message_is_exact_without_kms(
    source: Source, root: Path, size_bytes: int
) -> None:
    (root / "file.encrypted").write_bytes(sdk_message(LocalKeys(), b"p" * size_bytes))
    node = file_at(source, "file")
    assert (node.size_bytes, node.size_exact, node.problem) == (size_bytes, True, "")


def test_the_size_of_a_blob_is_an_estimate_until_it_is_known(source: Source, root: Path) -> None:
    path = root / "file.kms"
    path.write_bytes(BLOB)
    before = file_at(source, "file")
    assert (before.size_bytes, before.size_exact) == (len(b"a password"), False)
    source.remember_size("file.kms", before.version, 7)
    known = file_at(source, "file")
    assert (known.size_bytes, known.size_exact) == (7, True)
    assert known.version == before.version
    path.write_bytes(BLOB + b"x")
    assert not file_at(source, "file").size_exact


def test_a_size_of_another_version_is_not_remembered(source: Source, root: Path) -> None:
    (root / "file.kms").write_bytes(BLOB)
    older = file_at(source, "file").version
    (root / "new").write_bytes(BLOB)
    (root / "new").rename(root / "file.kms")
    assert file_at(source, "file").version != older
    source.remember_size("file.kms", older, 7)
    source.remember_size("never-seen", older, 7)
    assert not file_at(source, "file").size_exact


def test_every_kind_of_change_is_another_version(source: Source, root: Path) -> None:
    path = root / "file.kms"
    path.write_bytes(BLOB)
    seen = {file_at(source, "file").version}
    path.chmod(0o600)
    seen.add(file_at(source, "file").version)
    path.write_bytes(BLOB + b"longer")
    seen.add(file_at(source, "file").version)
    os.utime(path, ns=(1, 1))
    seen.add(file_at(source, "file").version)
    (root / "other").write_bytes(path.read_bytes())
    os.utime(root / "other", ns=(1, 1))
    (root / "other").rename(path)
    seen.add(file_at(source, "file").version)
    assert len(seen) == 5
    fd, version = source.open_ciphertext("file.kms")
    assert version == file_at(source, "file").version
    assert os.get_blocking(fd) is False
    os.close(fd)


def test_added_changed_and_removed_files_are_seen_at_once(source: Source, root: Path) -> None:
    assert served(source) == {}
    (root / "one.kms").write_bytes(BLOB)
    assert served(source) == {"one": "one.kms"}
    (root / "one.kms").rename(root / "two.kms")
    assert served(source) == {"two": "two.kms"}
    assert source.lookup("", "one") is None
    (root / "two.kms").unlink()
    assert served(source) == {}
    assert source.lookup("", "two") is None


def test_the_directory_shows_its_own_time(source: Source, root: Path) -> None:
    os.utime(root, ns=(5, 7))
    assert source.directory("") == SourceDirectory("", 7)


def test_survey_walks_every_directory_once(source: Source, root: Path) -> None:
    for path in ("a.kms", "d/b.kms", "d/e/c.encrypted", "d/e/README", "empty/.keep"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(BLOB if path.endswith(("kms", "encrypted")) else b"text")
    survey = source.survey()
    assert [file.path for file in survey.files] == ["a", "d/b", "d/e/c"]
    assert dict(survey.ignored) == {
        "d/e/README": "of no known format",
        "empty/.keep": "of no known format",
    }
