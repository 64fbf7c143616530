"""Certificates and private keys in files: what has expired, and what does not belong together."""

from datetime import timedelta
from pathlib import Path

import pytest

from kmsfs.manage.check_content import ContentCheck, check_content
from tests.support.canary import secret
from tests.support.certificates import NOW, certificate_pem, key_pem, new_key


def look_at(
    directory: Path, files: dict[str, bytes], *, within_days: int = 0
) -> dict[str, ContentCheck]:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    found = check_content(
        str(directory), sorted(files), now=NOW, expires_within=timedelta(days=within_days)
    )
    return {check.path: check for check in found}


def problem(check: ContentCheck) -> str:
    return "" if check.problem is None else f"{check.problem.error}: {check.problem.detail}"


def test_what_belongs_together_is_good(tmp_path: Path) -> None:
    key, authority = new_key(), new_key()
    chain = certificate_pem(key) + certificate_pem(authority, authority=True)
    found = look_at(
        tmp_path, {"ssl.key": key_pem(key), "ssl.crt": chain, "both.pem": key_pem(key) + chain}
    )
    assert [problem(check) for check in found.values()] == ["", "", ""]
    assert (found["both.pem"].certificates, found["both.pem"].private_keys) == (2, 1)
    assert found["ssl.crt"].expires_at == NOW + timedelta(days=100)
    assert found["ssl.key"].expires_at is None


def test_files_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    files = {
        "password": secret("content", 50),
        "empty": b"",
        "large": certificate_pem(new_key()) + bytes(1 << 20),
        "ssh": b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
        "locked.key": key_pem(new_key(), password=b"password"),
        "old.key": b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
        b"DEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
    }
    assert look_at(tmp_path, files) == {}


@pytest.mark.parametrize(
    ("begins", "ends", "within_days", "said"),
    [
        (-100, -1, 0, "Expired: certificate 1 of 1 expired on {ends}"),
        (-100, 0, 0, "Expired: certificate 1 of 1 expired on {ends}"),
        (-100, 20, 0, ""),
        (-100, 20, 30, "ExpiresSoon: certificate 1 of 1 expires on {ends}"),
        (-100, 40, 30, ""),
        (1, 40, 0, "NotYetValid: certificate 1 of 1 is valid from {begins} on"),
    ],
)
def test_time_of_a_certificate(
    *, tmp_path: Path, begins: int, ends: int, within_days: int, said: str
) -> None:
    times = {"begins": timedelta(days=begins), "ends": timedelta(days=ends)}
    certificate = certificate_pem(new_key(), begins=times["begins"], ends=times["ends"])
    found = look_at(tmp_path, {"a.crt": certificate}, within_days=within_days)
    dates = {name: f"{NOW + time:%Y-%m-%d}" for name, time in times.items()}
    assert problem(found["a.crt"]) == said.format(**dates)


def test_each_certificate_of_a_chain_counts(tmp_path: Path) -> None:
    key = new_key()
    chain = certificate_pem(key) + certificate_pem(new_key(), ends=timedelta(days=-1))
    found = look_at(tmp_path, {"a.pem": chain})
    assert problem(found["a.pem"]).startswith("Expired: certificate 2 of 2 expired on ")


@pytest.mark.parametrize(
    ("files", "where"),
    [
        (("own.pem",), "the same file"),
        (("ssl.key", "ssl.crt"), "ssl.crt"),
        (("d/ssl.key", "d/ssl.pem"), "ssl.pem"),
        (("privkey.pem", "cert.pem"), "cert.pem"),
    ],
)
def test_key_of_another_certificate_is_a_failure(
    tmp_path: Path, files: tuple[str, ...], where: str
) -> None:
    parts = (key_pem(new_key()), certificate_pem(new_key()))
    content = (
        dict(zip(files, parts, strict=True)) if len(files) > 1 else {files[0]: b"".join(parts)}
    )
    found = look_at(tmp_path, content)
    said = f"KeyMismatch: its private key is not that of the certificate in {where}"
    assert problem(found[files[0]]) == said
    assert {problem(found[name]) for name in files[1:]} <= {""}


def test_key_is_held_against_no_certificate_that_may_be_anothers(tmp_path: Path) -> None:
    authority = certificate_pem(new_key(), authority=True)
    files = {
        "one/a.key": key_pem(new_key()),
        "one/ca.pem": authority,
        "two/a.key": key_pem(new_key()),
        "two/b.key": key_pem(new_key()),
        "two/c.crt": certificate_pem(new_key()),
        "three/a.key": key_pem(new_key()),
        "three/b.crt": certificate_pem(new_key()),
        "three/c.crt": certificate_pem(new_key()),
        "four/a.key": key_pem(new_key()),
        "five/a.crt": certificate_pem(new_key()),
    }
    assert {problem(check) for check in look_at(tmp_path, files).values()} == {""}


def test_certbots_names_are_understood(tmp_path: Path) -> None:
    key, authority = new_key(), certificate_pem(new_key(), authority=True)
    leaf = certificate_pem(key)
    files = {
        "cert.pem": leaf,
        "chain.pem": authority,
        "fullchain.pem": leaf + authority,
        "privkey.pem": key_pem(key),
    }
    assert {problem(check) for check in look_at(tmp_path, files).values()} == {""}
    found = look_at(tmp_path, {**files, "privkey.pem": key_pem(new_key())})
    assert problem(found["privkey.pem"]).startswith("KeyMismatch: ")


@pytest.mark.parametrize("kind", ["certificate", "private key"])
@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damaged_block_is_a_failure(tmp_path: Path, kind: str, damage: str) -> None:
    pem = certificate_pem(new_key()) if kind == "certificate" else key_pem(new_key())
    broken = pem[:100] if damage == "cut" else pem.replace(b"\n", b"\nAAAA", 2)
    found = look_at(tmp_path, {"a.pem": broken})
    assert problem(found["a.pem"]) == f"ContentUnreadable: a {kind} in it is damaged"


def test_file_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    (found,) = check_content(str(tmp_path), ["missing"], now=NOW, expires_within=timedelta(days=0))
    assert problem(found) == "ENOENT: No such file or directory"


def test_nothing_of_a_private_key_is_shown(tmp_path: Path) -> None:
    key = new_key()
    found = look_at(tmp_path, {"a.pem": key_pem(key) + certificate_pem(new_key())})
    text = repr(found)
    assert not any(line in text for line in key_pem(key).decode().splitlines()[1:-1])
