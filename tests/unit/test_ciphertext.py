"""What a ciphertext says of itself without KMS, and what is known against it."""

import os
from pathlib import Path

import pytest

from kmsfs.formats.binding import PATH_KEY, VOLUME_KEY
from kmsfs.formats.detect import Format
from kmsfs.store.ciphertext import CiphertextFacts, read_facts, version_of
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message


def facts_of(path: Path, content: bytes) -> CiphertextFacts:
    """What is read of a file with this content."""
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_facts(fd, version_of(os.fstat(fd)))
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the test's own."""
    return tmp_path / "file"


def test_an_empty_file_is_told_for_what_it_is(path: Path) -> None:
    facts = facts_of(path, b"")
    assert facts.format is Format.UNKNOWN
    assert "failed `aws kms encrypt" in facts.problem


def test_a_message_names_its_keys_and_its_binding(path: Path) -> None:
    keys = LocalKeys()
    context = {VOLUME_KEY: "web", PATH_KEY: "a"}
    bound = facts_of(path, sdk_message(keys, b"content", context=context))
    free = facts_of(path, sdk_message(keys, b"content", context={"k": "v"}))
    assert (bound.bound, free.bound) == (True, False)
    assert bound.key == free.key == key_arn(1)
    assert (bound.size_bytes, bound.size_exact, bound.problem) == (7, True, "")


def test_a_header_larger_than_the_first_read_is_read_whole(path: Path) -> None:
    context = {f"key {n}": "v" * 900 for n in range(30)}
    facts = facts_of(path, sdk_message(LocalKeys(), b"small", context=context))
    assert (facts.size_bytes, facts.size_exact, facts.problem) == (5, True, "")


@pytest.mark.parametrize("kept_bytes", [3, 10, 50])
def test_a_message_cut_in_its_header_can_never_be_decrypted(path: Path, kept_bytes: int) -> None:
    facts = facts_of(path, sdk_message(LocalKeys(), b"content")[:kept_bytes])
    assert (facts.format, facts.problem) == (Format.ESDK, "truncated in its header")
    assert (facts.size_bytes, facts.size_exact, facts.bound) == (0, False, False)


def test_a_message_cut_in_its_body_has_a_problem(path: Path) -> None:
    facts = facts_of(path, sdk_message(LocalKeys(), b"x" * 10_000)[:-3000])
    assert facts.problem
    assert not facts.size_exact


def test_too_many_bytes_for_a_blob_are_a_problem(path: Path) -> None:
    blob = LocalKeys().encrypt(b"p", key_id=key_arn(1), encryption_context={}).ciphertext
    facts = facts_of(path, blob + bytes(7000))
    assert (facts.format, facts.size_exact) == (Format.KMS_BLOB, False)
    assert "more than a KMS ciphertext blob can have" in facts.problem


@pytest.mark.parametrize("size_bytes", [1, 100, 4096])
def test_the_estimate_of_a_blob_of_todays_shape_is_its_size(path: Path, size_bytes: int) -> None:
    blob = (
        LocalKeys().encrypt(b"p" * size_bytes, key_id=key_arn(1), encryption_context={}).ciphertext
    )
    facts = facts_of(path, blob)
    assert (facts.size_bytes, facts.size_exact, facts.bound) == (size_bytes, False, False)
