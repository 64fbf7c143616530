"""`kmsfs encrypt`: what is written, where, bound to what; and that nothing else is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.formats.esdk_header import EsdkHeader, parse_header
from tests.cli.conftest import Commands, KeyMaker

SECRET = b"correct horse battery staple\n"


def header_of(path: Path) -> EsdkHeader:
    return parse_header(path.read_bytes())


def context_of(path: Path) -> dict[str, str]:
    pairs = dict(header_of(path).encryption_context)
    del pairs["aws-crypto-public-key"]
    return pairs


def leftovers(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")} - {"kmsfs.toml"}


@pytest.fixture
def plain(volume: Path) -> Path:
    path = volume / "nginx" / "ssl.pem"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


def test_output_lies_beside_the_input_and_is_bound_to_its_place(
    kmsfs: Commands, volume: Path, plain: Path, key: str
) -> None:
    started = int(time.time())
    done = kmsfs.good("encrypt", "nginx/ssl.pem")
    output = volume / "nginx" / "ssl.pem.encrypted"
    assert done.stdout == b"nginx/ssl.pem.encrypted\n"
    assert done.lines == [
        "kmsfs: hint: the plaintext of nginx/ssl.pem is left alone: remove it when it is not needed"
    ]
    assert plain.read_bytes() == SECRET
    assert output.stat().st_mode & 0o7777 == 0o600
    context = context_of(output)
    # A version rises over removed files and machines: it is the time, where nothing is higher.
    assert started <= int(context.pop("kmsfs:version")) <= time.time()
    assert context == {"kmsfs:volume": "web", "kmsfs:path": "nginx/ssl.pem"}
    header = header_of(output)
    assert header.key_arns == (key,)
    assert header.suite.signed
    assert header.suite.committing
    assert SECRET not in output.read_bytes()
    assert kmsfs.good("decrypt", output).stdout == SECRET


def test_existing_output_needs_force_and_its_version_rises(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    kmsfs.good("encrypt", plain)
    output = plain.with_name("ssl.pem.encrypted")
    before, first_version = output.read_bytes(), int(context_of(output)["kmsfs:version"])
    done = kmsfs("encrypt", plain)
    assert done.status == 2
    assert done.lines == [
        f"kmsfs: error: {plain}: {output} exists already",
        "kmsfs: hint: add --force to replace it",
    ]
    assert output.read_bytes() == before
    output.chmod(0o644)
    kmsfs.good("encrypt", plain, "--force")
    assert int(context_of(output)["kmsfs:version"]) > first_version
    assert output.stat().st_mode & 0o7777 == 0o600
    assert leftovers(volume) == {"nginx", "ssl.pem", "ssl.pem.encrypted"}


def test_standard_input_is_named_by_path_or_output(kmsfs: Commands, volume: Path) -> None:
    (volume / "db").mkdir()
    done = kmsfs.good("encrypt", "-", "--path", "db/password", stdin=SECRET)
    assert done.stdout == b"db/password.encrypted\n"
    assert done.stderr == ""
    assert context_of(volume / "db" / "password.encrypted")["kmsfs:path"] == "db/password"
    kmsfs.good("encrypt", "-", "-o", "db/other", stdin=b"")
    assert context_of(volume / "db" / "other")["kmsfs:path"] == "db/other"
    assert kmsfs.good("decrypt", "db/other").stdout == b""
    kmsfs.good("encrypt", "-", "--path", "db/third", "-o", "db/", stdin=SECRET)
    assert kmsfs.good("decrypt", "db/third.encrypted").stdout == SECRET


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-"], "standard input: standard input has no name"),
        (["-", "-o", "."], "standard input: standard input has no name"),
        (["-", "--path", "../x"], "standard input: '../x' is not a path within a volume"),
        (["-", "--path", "/x"], "standard input: '/x' is not a path within a volume"),
        (["-", "--path", "a//b"], "standard input: 'a//b' is not a path within a volume"),
        (["-", "-"], "standard input can be read once"),
        (["nginx", "nginx", "-o", "x"], "x is not a directory, and there are several files"),
        (["a", "--path", "x"], "a: --path names standard input; a file has its own name"),
        (["nginx"], "nginx: it is a directory"),
        (["missing"], "missing: No such file or directory"),
        (["a", "-o", "a", "--force"], "a: input and output are the same file"),
        (
            ["a", "--encryption-context", "kmsfs:path=x"],
            "a: the encryption context key 'kmsfs:path' is not free to be set",
        ),
        (
            ["a", "--raw", "--encryption-context", "aws-crypto-x=x"],
            "a: the encryption context key 'aws-crypto-x' is not free to be set",
        ),
    ],
)
def test_wrong_usage_is_refused_and_leaves_nothing(
    kmsfs: Commands, volume: Path, plain: Path, arguments: list[str], error: str
) -> None:
    (volume / "a").write_bytes(SECRET)
    done = kmsfs("encrypt", *arguments, stdin=SECRET)
    assert done.status == 2
    assert done.lines[0] == f"kmsfs: error: {error}"
    assert leftovers(volume) == {"nginx", "ssl.pem", "a"}


def test_path_that_disagrees_with_the_output_is_refused(kmsfs: Commands, volume: Path) -> None:
    done = kmsfs("encrypt", "-", "--path", "a", "-o", "b", stdin=SECRET)
    assert done.status == 2
    assert done.lines[0] == (
        f"kmsfs: error: standard input: {volume}/b would be served as 'b', not as 'a'"
    )


def test_several_files_are_each_named_when_they_fail(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    (volume / "out").mkdir()
    done = kmsfs("encrypt", "nginx/ssl.pem", "missing", "nginx", "-o", "out")
    assert done.status == 1
    assert done.stdout == b"out/ssl.pem.encrypted\n"
    assert done.lines[:3] == [
        "kmsfs: error: missing: No such file or directory",
        "kmsfs: error: nginx: it is a directory",
        "kmsfs: hint: name files",
    ]
    assert done.lines[3].startswith("kmsfs: hint: the plaintext of nginx/ssl.pem is left alone")


def test_without_a_volume_binding_must_be_declined(kmsfs: Commands, key: str) -> None:
    (kmsfs.directory / "a").write_bytes(SECRET)
    done = kmsfs("encrypt", "a", "--key-id", key)
    assert done.status == 2
    assert done.stderr == (
        f"kmsfs: error: a: no kmsfs.toml lies in or above {kmsfs.directory}, so there is nothing "
        "to bind it to\n"
        "kmsfs: hint: make a volume with `kmsfs init`, or add --unbound\n"
    )
    kmsfs.good("encrypt", "a", "--key-id", key, "--unbound", "--encryption-context", "s=web")
    assert context_of(kmsfs.directory / "a.encrypted") == {"s": "web"}
    assert kmsfs.good("decrypt", "a.encrypted", "--key-id", key).stdout == SECRET


def test_without_a_volume_a_key_must_be_named(kmsfs: Commands) -> None:
    done = kmsfs("encrypt", "-", "-o", "a", "--unbound", stdin=SECRET)
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: standard input: no key to encrypt under",
        "kmsfs: hint: name one with --key-id",
    ]


def test_raw_blob_is_what_kms_gave_and_is_warned_of_where_it_would_not_be_served(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    done = kmsfs.good("encrypt", plain, "--raw", "-o", "raw.kms")
    assert done.stderr.startswith(
        f"kmsfs: warning: {volume}/raw.kms: it is bound to no place, so volume 'web' does not "
        "serve it\n"
        "kmsfs: hint: name it under unbound in kmsfs.toml\n"
    )
    assert kmsfs.good("decrypt", "raw.kms").stdout == SECRET
    text = (volume / "kmsfs.toml").read_text().replace("unbound = []", 'unbound = ["raw"]')
    (volume / "kmsfs.toml").write_text(text)
    assert len(kmsfs.good("encrypt", plain, "--raw", "-o", "raw.kms", "--force").lines) == 1


def test_raw_takes_what_kms_takes(kmsfs: Commands, volume: Path) -> None:
    kmsfs.good("encrypt", "-", "--raw", "-o", "most.kms", stdin=bytes(4096))
    assert kmsfs.good("decrypt", "most.kms").stdout == bytes(4096)
    done = kmsfs("encrypt", "-", "--raw", "-o", "more.kms", stdin=bytes(4097))
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: standard input: 4097 bytes; a bare KMS blob takes 4096 at most",
        "kmsfs: hint: leave --raw out",
    ]
    done = kmsfs("encrypt", "-", "--raw", "-o", "none.kms", stdin=b"")
    assert done.lines[0] == "kmsfs: error: standard input: KMS encrypts no empty plaintext"
    assert leftovers(volume) == {"most.kms"}


def test_ciphertext_is_not_encrypted_again_by_mistake(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    kmsfs.good("encrypt", plain)
    done = kmsfs("encrypt", "nginx/ssl.pem.encrypted")
    assert done.status == 2
    assert done.lines == [
        "kmsfs: error: nginx/ssl.pem.encrypted: it is ciphertext already",
        "kmsfs: hint: add --force to encrypt it once more",
    ]
    kmsfs.good("encrypt", "nginx/ssl.pem.encrypted", "--force")


def test_volumes_pairs_are_written_with_those_given(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    with (volume / "kmsfs.toml").open("a") as toml:
        toml.write('encryption_context = { service = "web", stage = "test" }\n')
    kmsfs.good(
        "encrypt", plain, "--encryption-context", "stage=live", "--encryption-context", "x=a=b"
    )
    pairs = context_of(plain.with_name("ssl.pem.encrypted"))
    assert pairs.items() >= {"service": "web", "stage": "live", "x": "a=b"}.items()


def test_key_that_the_volume_does_not_allow_is_warned_of(
    kmsfs: Commands, volume: Path, plain: Path, new_key: KeyMaker, alias: str
) -> None:
    other = new_key(alias=alias)
    done = kmsfs.good("encrypt", "nginx/ssl.pem", "--key-id", alias)
    assert done.lines[0] == (
        f"kmsfs: warning: {plain}.encrypted: volume 'web' does not allow its key {other}"
    )
    done = kmsfs("decrypt", "nginx/ssl.pem.encrypted")
    assert done.status == 4
    assert done.lines[0] == f"kmsfs: error: nginx/ssl.pem.encrypted: encrypted under {other}"


@pytest.mark.parametrize(
    "extra", [["--key-id", "alias/nobody"], ["--endpoint-url", "http://127.0.0.1:9"]]
)
def test_failure_of_kms_leaves_no_output(
    kmsfs: Commands, volume: Path, plain: Path, extra: list[str]
) -> None:
    done = kmsfs("encrypt", plain, *extra)
    assert done.status in {4, 5}
    assert leftovers(volume) == {"nginx", "ssl.pem"}


def test_missing_credentials_have_a_status_of_their_own(
    bare_kmsfs: Commands, kmsfs: Commands, volume: Path, plain: Path
) -> None:
    del kmsfs.env["AWS_ACCESS_KEY_ID"]
    done = kmsfs("encrypt", plain)
    assert done.status == 5
    assert done.lines == [
        f"kmsfs: error: {plain}: no AWS credentials found",
        "kmsfs: hint: give this process a role, a profile or credentials",
    ]


def reading_command(kmsfs: Commands, volume: Path) -> subprocess.Popen[bytes]:
    """A command that has begun to read its plaintext and waits for the rest."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kmsfs", "encrypt", "-", "--path", "password"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=volume,
        env=kmsfs.env,
    )
    assert process.stdin is not None
    # More than a pipe holds: once it is written, the command is reading.
    process.stdin.write(bytes(1 << 20))
    process.stdin.flush()
    return process


def test_process_that_holds_plaintext_is_locked_in_memory_and_dumps_no_core(
    kmsfs: Commands, volume: Path
) -> None:
    process = reading_command(kmsfs, volume)
    proc = Path("/proc") / str(process.pid)
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    (core,) = (line for line in (proc / "limits").read_text().splitlines() if "core file" in line)
    process.communicate(timeout=60)
    assert int(status["VmLck"].split()[0]) > 0
    assert core.split()[4:6] == ["0", "0"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What is started now can be interrupted, even if SIGINT is ignored here.

    A shell ignores it for what it starts in the background, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_no_output(kmsfs: Commands, volume: Path, number: signal.Signals) -> None:
    process = reading_command(kmsfs, volume)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == b""
    assert leftovers(volume) == set()


def test_name_that_is_not_utf_8_is_refused(kmsfs: Commands, volume: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (volume / name).write_bytes(SECRET)
    done = kmsfs("encrypt", name)
    assert done.status == 2
    assert "is not UTF-8" in done.lines[0]
    assert leftovers(volume) == {name}


def test_pair_that_is_not_utf_8_is_refused(kmsfs: Commands, volume: Path, plain: Path) -> None:
    pair = os.fsdecode(b"team=caf\xe9")
    done = kmsfs("encrypt", plain, "--encryption-context", pair)
    assert (done.status, done.lines) == (
        2,
        [f"kmsfs: error: {plain}: the value b'caf\\xe9' is not UTF-8"],
    )


def test_untrusted_configuration_is_not_honoured(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    (volume / "kmsfs.toml").chmod(0o666)
    done = kmsfs("encrypt", plain)
    assert done.status == 2
    assert "can be written by others" in done.lines[0]


def test_link_to_a_directory_of_the_volume_leads_to_its_place(
    kmsfs: Commands, volume: Path, plain: Path
) -> None:
    link = volume.parent / "link"
    link.symlink_to("web/nginx")
    kmsfs.good("encrypt", link / "ssl.pem")
    pairs = context_of(volume / "nginx" / "ssl.pem.encrypted")
    assert pairs["kmsfs:path"] == "nginx/ssl.pem"
