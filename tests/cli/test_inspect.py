"""`kmsfs inspect`: what files say of themselves, without KMS."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Commands
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message

ARN = key_arn(1)


@pytest.fixture
def directory(bare_kmsfs: Commands) -> Path:
    """A volume made by hand: no command here may need KMS."""
    path = bare_kmsfs.directory
    (path / "kmsfs.toml").write_text('[volume]\nname = "web"\nunbound = ["listed"]\n')
    return path


def message(path: str) -> bytes:
    context = {"kmsfs:volume": "web", "kmsfs:path": path, "kmsfs:version": "3", "a": "b"}
    return sdk_message(LocalKeys(), bytes(300), suite_id=0x0478, context=context)


def blob() -> bytes:
    return LocalKeys().encrypt(bytes(300), key_id=ARN, encryption_context={}).ciphertext


def test_message_is_described_in_full(bare_kmsfs: Commands, directory: Path) -> None:
    (directory / "x.encrypted").write_bytes(message("x"))
    done = bare_kmsfs.good("inspect", "x.encrypted")
    assert done.stdout.decode().splitlines() == [
        "x.encrypted",
        "  format:    AWS Encryption SDK message",
        f"  key:       {ARN}",
        "  account:   111122223333",
        "  region:    eu-central-1",
        "  suite:     AES_256_GCM_HKDF_SHA512_COMMIT_KEY (committing, not signed)",
        "  context:   a=b",
        "  context:   kmsfs:path=x",
        "  context:   kmsfs:version=3",
        "  context:   kmsfs:volume=web",
        "  plaintext: 300 bytes (exact)",
        "  binding:   fits",
    ]
    (found,) = json.loads(bare_kmsfs.good("inspect", "--json", "x.encrypted").stdout)
    assert found == {
        "path": "x.encrypted",
        "format": "encryption-sdk",
        "size_bytes": len(message("x")),
        "plaintext_size": "exact",
        "plaintext_size_bytes": 300,
        "keys": [{"arn": ARN, "account": "111122223333", "region": "eu-central-1"}],
        "encryption_context": {
            "a": "b",
            "kmsfs:path": "x",
            "kmsfs:version": "3",
            "kmsfs:volume": "web",
        },
        "suite": "AES_256_GCM_HKDF_SHA512_COMMIT_KEY",
        "committing": True,
        "signed": False,
        "frame_length_bytes": 4096,
        "binding": {"fit": "fits", "detail": ""},
        "problem": None,
    }


@pytest.mark.parametrize(
    ("name", "data", "fit"),
    [
        ("y", message("x"), "does not fit: bound to path 'x', but lies at 'y'"),
        ("y", blob(), "unbound: volume 'web' does not serve it"),
        (
            "listed.kms",
            blob(),
            "unbound: volume 'web' serves it all the same: it is listed under unbound",
        ),
    ],
)
def test_binding_is_held_against_the_place(
    bare_kmsfs: Commands, directory: Path, name: str, data: bytes, fit: str
) -> None:
    (directory / name).write_bytes(data)
    assert f"  binding:   {fit}\n" in bare_kmsfs.good("inspect", name).stdout.decode()


def test_blob_size_is_an_estimate(bare_kmsfs: Commands, directory: Path) -> None:
    (directory / "a").write_bytes(blob())
    assert "300 bytes (estimated)" in bare_kmsfs.good("inspect", "a").stdout.decode()


@pytest.mark.parametrize(
    ("data", "format_name", "problem"),
    [
        (b"", "unknown", "it is empty"),
        (b"text", "unknown", "it is of no known format"),
        (
            message("x")[:-1],
            "AWS Encryption SDK message",
            "the message is cut short, or bytes follow its end",
        ),
        (message("x")[:30], "AWS Encryption SDK message", "the message ends within its header"),
        (
            b"AQICAHgA!",
            "KMS ciphertext blob in base64",
            "begins as base64 of a KMS blob, but is not base64",
        ),
        (
            bytes.fromhex("0102020078") + bytes(7000),
            "KMS ciphertext blob",
            "7005 bytes are too many for a KMS ciphertext blob",
        ),
    ],
)
def test_what_cannot_be_ciphertext_has_status_3(
    bare_kmsfs: Commands, directory: Path, data: bytes, format_name: str, problem: str
) -> None:
    (directory / "x").write_bytes(data)
    (directory / "good").write_bytes(blob())
    done = bare_kmsfs("inspect", "good", "x")
    assert done.status == 3
    _, shown = done.stdout.decode().split("\n\n")
    assert f"  format:    {format_name}\n" in shown
    assert f"  problem:   {problem}\n" in shown


def test_unreadable_files_are_named_and_the_others_shown(
    bare_kmsfs: Commands, directory: Path
) -> None:
    (directory / "a").write_bytes(blob())
    (directory / "d").mkdir()
    done = bare_kmsfs("inspect", "--json", "missing", "a", "d")
    assert done.status == 1
    assert done.lines == [
        "kmsfs: error: missing: No such file or directory",
        "kmsfs: error: d: it is not a regular file",
        "kmsfs: hint: name files",
    ]
    assert [found["path"] for found in json.loads(done.stdout)] == ["a"]
    assert bare_kmsfs("inspect", "missing").status == 2


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    bare_kmsfs: Commands, directory: Path
) -> None:
    context = {"kmsfs:path": "\x1b[2J", "note": "one\ntwo"}
    (directory / "x").write_bytes(sdk_message(LocalKeys(), b"", context=context))
    shown = bare_kmsfs.good("inspect", "x").stdout.decode()
    assert "\x1b" not in shown
    assert r"note=one\ntwo" in shown


def test_file_outside_any_volume_is_unbound(bare_kmsfs: Commands) -> None:
    (bare_kmsfs.directory / "a").write_bytes(blob())
    shown = bare_kmsfs.good("inspect", "a").stdout.decode()
    assert "  binding:   unbound: it lies in no volume\n" in shown


def test_untrusted_configuration_leaves_the_binding_unknown(
    bare_kmsfs: Commands, directory: Path
) -> None:
    (directory / "kmsfs.toml").chmod(0o666)
    (directory / "x").write_bytes(message("x"))
    assert "  binding:   unknown: " in bare_kmsfs.good("inspect", "x").stdout.decode()
