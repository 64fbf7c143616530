"""`kmsfs decrypt`: plaintext goes where it was told to, and nowhere else."""

import base64
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Commands, KeyMaker

SECRET = b"correct horse battery staple\n"


@pytest.fixture
def ciphertext(kmsfs: Commands, volume: Path) -> Path:
    kmsfs.good("encrypt", "-", "--path", "password", stdin=SECRET)
    return volume / "password.encrypted"


def test_standard_output_gets_the_exact_bytes(kmsfs: Commands, volume: Path) -> None:
    store = os.urandom(300_000)
    kmsfs.good("encrypt", "-", "--path", "store.p12", stdin=store)
    done = kmsfs.good("decrypt", "store.p12.encrypted")
    assert done.stdout == store
    assert done.stderr == ""


def test_output_file_is_private_and_warned_of(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    done = kmsfs.good("decrypt", "password.encrypted", "-o", "plain")
    assert done.stdout == b""
    assert done.lines == [f"kmsfs: warning: {volume}/plain lies on disk, and holds plaintext now"]
    assert (volume / "plain").read_bytes() == SECRET
    assert (volume / "plain").stat().st_mode & 0o7777 == 0o600
    done = kmsfs("decrypt", "password.encrypted", "-o", "plain")
    assert done.status == 2
    assert done.lines == [
        f"kmsfs: error: password.encrypted: {volume}/plain exists already",
        "kmsfs: hint: add --force to replace it",
    ]
    kmsfs.good("decrypt", "password.encrypted", "-o", "plain", "--force")


def test_output_directory_gets_the_served_name(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    (volume / "out").mkdir()
    kmsfs.good("decrypt", "password.encrypted", "-o", "out")
    assert (volume / "out" / "password").read_bytes() == SECRET


@pytest.fixture
def memory_directory() -> Path:
    path = Path("/dev/shm")
    if not os.path.ismount(path):
        pytest.skip("/dev/shm is no filesystem in memory here")
    return path


def test_output_in_memory_is_not_warned_of(
    kmsfs: Commands, ciphertext: Path, memory_directory: Path
) -> None:
    target = memory_directory / f"kmsfs-test-{os.getpid()}"
    try:
        assert kmsfs.good("decrypt", ciphertext, "-o", target).stderr == ""
        assert target.read_bytes() == SECRET
    finally:
        target.unlink(missing_ok=True)


def test_standard_output_on_disk_is_warned_of(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    with (volume / "plain").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "kmsfs", "decrypt", ciphertext],
            stdout=file,
            stderr=subprocess.PIPE,
            env=kmsfs.env,
            check=True,
            timeout=60,
        )
    assert done.stderr == b"kmsfs: warning: standard output lies on disk, and holds plaintext now\n"


def run_on_terminal(kmsfs: Commands, *arguments: str | Path) -> tuple[int, bytes, bytes]:
    """Run with a terminal for standard output; status, what it showed, standard error."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", *map(str, arguments)],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=kmsfs.env,
        cwd=kmsfs.directory,
    )
    os.close(theirs)
    _, stderr = process.communicate(timeout=60)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:
        # A terminal that nobody has open any more gives EIO where files give their end.
        pass
    finally:
        os.close(ours)
    return process.returncode, shown, stderr


def test_terminal_gets_plaintext_only_with_force(kmsfs: Commands, ciphertext: Path) -> None:
    status, shown, stderr = run_on_terminal(kmsfs, "decrypt", ciphertext)
    assert status == 2
    assert shown == b""
    assert stderr.decode().splitlines() == [
        "kmsfs: error: standard output is a terminal",
        "kmsfs: hint: send the plaintext to a program, or add --force to show it",
    ]
    status, shown, _ = run_on_terminal(kmsfs, "decrypt", ciphertext, "--force")
    assert status == 0
    assert shown.replace(b"\r\n", b"\n") == SECRET


def test_moved_file_is_refused(kmsfs: Commands, volume: Path, ciphertext: Path) -> None:
    ciphertext.rename(volume / "other.encrypted")
    done = kmsfs("decrypt", "other.encrypted")
    assert done.status == 3
    assert done.stdout == b""
    assert done.stderr == (
        "kmsfs: error: other.encrypted: bound to path 'password', but lies at 'other'\n"
        "kmsfs: hint: the file was moved, renamed or copied from elsewhere: encrypt it for this "
        "place\n"
    )


def test_file_taken_out_of_its_volume_is_refused(
    kmsfs: Commands, volume: Path, ciphertext: Path, key: str
) -> None:
    ciphertext.rename(volume.parent / "password.encrypted")
    done = kmsfs("decrypt", "../password.encrypted", "--key-id", key)
    assert done.status == 3
    assert done.lines[0] == (
        "kmsfs: error: ../password.encrypted: bound to volume 'web', but lies in no volume"
    )


def test_changed_file_is_refused_and_leaves_no_output(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    data = bytearray(ciphertext.read_bytes())
    data[-1] ^= 1
    ciphertext.write_bytes(data)
    done = kmsfs("decrypt", "password.encrypted", "-o", "plain")
    assert done.status == 3
    assert done.lines[0].startswith("kmsfs: error: password.encrypted: not authentic")
    assert {path.name for path in volume.iterdir()} == {"kmsfs.toml", "password.encrypted"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "the file is empty"),
        (b"-----BEGIN CERTIFICATE-----", "the file is of no known format"),
        (bytes.fromhex("0205780102"), "the message ends within its header"),
    ],
)
def test_what_is_no_ciphertext_is_named_so(
    kmsfs: Commands, volume: Path, content: bytes, error: str
) -> None:
    (volume / "x").write_bytes(content)
    done = kmsfs("decrypt", "x")
    assert done.status == 3
    assert done.lines[0] == f"kmsfs: error: x: {error}"


def test_standard_input_is_decrypted_under_its_path(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    data = ciphertext.read_bytes()
    assert kmsfs.good("decrypt", "-", "--path", "password", stdin=data).stdout == SECRET
    done = kmsfs("decrypt", "-", stdin=data)
    assert done.status == 3
    done = kmsfs("decrypt", "-", "-o", ".", stdin=data)
    assert done.lines[0] == "kmsfs: error: standard input: standard input has no name"


def test_blobs_are_decrypted_under_the_keys_given(
    kmsfs: Commands, new_key: KeyMaker, key: str
) -> None:
    blob = new_key.client.encrypt(KeyId=key, Plaintext=SECRET)
    (kmsfs.directory / "a.kms").write_bytes(blob["CiphertextBlob"])
    (kmsfs.directory / "b.kms").write_bytes(base64.encodebytes(blob["CiphertextBlob"]))
    for name in ("a.kms", "b.kms"):
        assert kmsfs.good("decrypt", name, "--key-id", key).stdout == SECRET
        assert kmsfs.good("decrypt", name, "--any-key").stdout == SECRET
        done = kmsfs("decrypt", name)
        assert done.status == 4
        assert done.stderr == (
            f"kmsfs: error: {name}: a bare KMS ciphertext blob does not name its key, and no key "
            "is allowed here\n"
            "kmsfs: hint: name its key with --key-id or under key_ids, or take any with --any-key\n"
        )


def test_unbound_file_of_a_volume_is_decrypted_with_a_warning(
    kmsfs: Commands, volume: Path
) -> None:
    kmsfs.good("encrypt", "-", "-o", "x", "--unbound", stdin=SECRET)
    done = kmsfs.good("decrypt", "x")
    assert done.stdout == SECRET
    assert done.lines == [
        "kmsfs: warning: x: it is bound to no place, so volume 'web' does not serve it"
    ]


def test_key_inside_a_file_is_not_asked_unless_allowed(
    kmsfs: Commands, key: str, new_key: KeyMaker
) -> None:
    kmsfs.good("encrypt", "-", "-o", "x", "--unbound", "--key-id", key, stdin=SECRET)
    for extra in ([], ["--key-id", new_key()]):
        done = kmsfs("decrypt", "x", *extra)
        assert done.status == 4
        assert done.lines[0] == f"kmsfs: error: x: encrypted under {key}"
    assert kmsfs.good("decrypt", "x", "--any-key").stdout == SECRET
    assert kmsfs.good("decrypt", "x", "--key-id", key.rpartition("/")[2]).stdout == SECRET


def test_any_key_and_certain_keys_contradict_each_other(kmsfs: Commands, volume: Path) -> None:
    done = kmsfs("decrypt", "x", "--any-key", "--key-id", "alias/web")
    assert done.status == 2
    assert done.lines == ["kmsfs: error: x: --any-key and --key-id contradict each other"]


def test_any_key_sets_the_volumes_keys_aside(
    kmsfs: Commands, volume: Path, new_key: KeyMaker
) -> None:
    kmsfs.good("encrypt", "-", "--path", "x", "--key-id", new_key(), stdin=SECRET)
    assert kmsfs("decrypt", "x.encrypted").status == 4
    assert kmsfs.good("decrypt", "x.encrypted", "--any-key").stdout == SECRET


def test_devices_and_links_are_never_replaced(
    kmsfs: Commands, volume: Path, ciphertext: Path
) -> None:
    (volume / "link").symlink_to("password.encrypted")
    for target in ("/dev/null", "link"):
        done = kmsfs("decrypt", ciphertext, "-o", target, "--force")
        assert done.status == 2
        assert done.lines[0].endswith("exists and is not a regular file")
    assert (volume / "link").is_symlink()
