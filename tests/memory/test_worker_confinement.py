"""A real worker, from a real zygote, that tries what it must not; beside one that may."""

import json
import os
import socket
from pathlib import Path

import pytest

from kmsfs.decryptor import wire
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.formats.binding import Place
from tests.support.forbidden import LISTENING, LOOKING, REFUSED, WRITING, Attempts
from tests.support.peers import WorkerPeer, running_peer
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

FORBIDDEN = (*WRITING, *LOOKING, *LISTENING, "make a packet socket")

MODULE = "tests.support.probing_zygote"


@pytest.fixture
def rules(kms_key: KmsKey) -> DecryptRules:
    """Rules that allow the test's key."""
    return DecryptRules(key_ids=(kms_key.arn,), place=Place(None, "file"))


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    """What is tried, in a directory of its own."""
    directory = tmp_path / "attempts"
    directory.mkdir()
    found = Attempts(directory)
    found.prepare()
    return found


def ask(
    worker: WorkerPeer, rules: DecryptRules, directory: Path, port: int, *names: str
) -> dict[str, str]:
    """Have a worker try, and hear what became of it."""
    path = directory.parent / "request"
    path.write_text(json.dumps({"directory": str(directory), "port": port, "names": names}))
    worker.request(path, rules)
    outcomes: dict[str, str] = json.loads(worker.plaintext()[1])
    return outcomes


@pytest.mark.needs_root
def test_control_a_worker_that_is_not_confined_can_do_everything(
    strict_kms: StrictKms, rules: DecryptRules, attempts: Attempts
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        running_peer(
            strict_kms.env(), strict_kms.endpoint_url, module=MODULE, more=["unconfined"]
        ) as peer,
    ):
        port = other.getsockname()[1]
        names = (*FORBIDDEN, "connect by TCP")
        outcomes = ask(peer, rules, attempts.directory, port, *names)
        assert set(outcomes.values()) == {"done"}, outcomes


def test_a_worker_can_neither_exec_nor_write_nor_listen_nor_look_into_other_processes(
    strict_kms: StrictKms, rules: DecryptRules, attempts: Attempts
) -> None:
    with running_peer(strict_kms.env(), strict_kms.endpoint_url, module=MODULE) as peer:
        outcomes = ask(peer, rules, attempts.directory, 0, *FORBIDDEN)
        assert set(outcomes.values()) <= REFUSED, outcomes


def test_a_worker_connects_to_the_port_of_kms_and_to_no_other(
    strict_kms: StrictKms, rules: DecryptRules, attempts: Attempts
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        running_peer(strict_kms.env(), strict_kms.endpoint_url, module=MODULE) as peer,
    ):
        connect = "connect by TCP"
        elsewhere = ask(peer, rules, attempts.directory, other.getsockname()[1], connect)
        assert elsewhere[connect] in REFUSED
        assert ask(peer, rules, attempts.directory, strict_kms.port, connect) == {connect: "done"}


def test_a_worker_connects_to_the_port_of_its_proxy(
    strict_kms: StrictKms, rules: DecryptRules, attempts: Attempts
) -> None:
    connect = "connect by TCP"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        env = strict_kms.env(HTTP_PROXY=f"http://127.0.0.1:{port}")
        with running_peer(env, strict_kms.endpoint_url, module=MODULE) as peer:
            assert ask(peer, rules, attempts.directory, port, connect) == {connect: "done"}


def test_a_worker_says_what_confines_it(
    strict_kms: StrictKms, kms_key: KmsKey, rules: DecryptRules, tmp_path: Path
) -> None:
    path = tmp_path / "file.kms"
    path.write_bytes(kms_key.seal(b"content", {}))
    with running_peer(strict_kms.env(), strict_kms.endpoint_url) as peer:
        peer.request(path, rules)
        decrypted, _ = peer.plaintext()
        assert decrypted.report.sandbox is not None
        assert decrypted.report.sandbox.seccomp
        status = Path(f"/proc/{peer.pid}/status").read_text()
        assert "\nSeccomp:\t2\n" in status
        assert "\nNoNewPrivs:\t1\n" in status


def test_a_worker_without_credentials_asks_kms_for_nothing_and_looks_again_at_the_next_request(
    strict_kms: StrictKms, kms_key: KmsKey, rules: DecryptRules, tmp_path: Path
) -> None:
    path, files = tmp_path / "file.kms", tmp_path / "credentials"
    path.write_bytes(kms_key.seal(b"content", {}))
    env = {
        name: value
        for name, value in strict_kms.env(AWS_SHARED_CREDENTIALS_FILE=str(files)).items()
        if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    with running_peer(env, strict_kms.endpoint_url) as peer:
        assert peer.failure(path, rules)[0] == "CredentialsUnavailable"
        assert strict_kms.calls() == []
        assert "\nSeccomp:\t0\n" in Path(f"/proc/{peer.pid}/status").read_text()
        admin = strict_kms.admin
        files.write_text(
            f"[default]\naws_access_key_id = {admin.access_key_id}\n"
            f"aws_secret_access_key = {admin.secret_access_key}\n"
        )
        peer.request(path, rules)
        assert peer.plaintext()[1] == b"content"
        assert "\nSeccomp:\t2\n" in Path(f"/proc/{peer.pid}/status").read_text()


def test_a_worker_whose_credentials_were_refused_says_so_and_ends(
    strict_kms: StrictKms, kms_key: KmsKey, rules: DecryptRules, tmp_path: Path
) -> None:
    path = tmp_path / "file.kms"
    path.write_bytes(kms_key.seal(b"content", {}))
    with running_peer(strict_kms.env(), strict_kms.endpoint_url) as peer:
        peer.request(path, rules)
        assert not peer.plaintext()[0].last
        strict_kms.admin.expired = True
        request = peer.request(path, rules)
        assert peer.answer() == (wire.AskAnother(id=request.id), None)
        assert peer.ended()
        second = peer.another()
        second.request(path, rules)
        failed, _ = wire.expect(second.answer(), wire.Failed)
        assert (failed.code, failed.last) == ("CredentialsUnavailable", True)
        assert second.ended()


def test_the_zygote_never_maps_the_memory_of_credentials(
    strict_kms: StrictKms, kms_key: KmsKey, rules: DecryptRules, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("an undumpable process's maps are root's to see")
    path = tmp_path / "file.kms"
    path.write_bytes(kms_key.seal(b"content", {}))
    role = strict_kms.create_role("reader", strict_kms.admin)
    with running_peer(strict_kms.env(), strict_kms.endpoint_url, role_arn=role) as peer:
        assert peer.greeting.keeps_credentials
        for worker in (peer, peer.another()):
            worker.request(path, rules)
            assert worker.plaintext()[1] == b"content"
        assert "secretmem" not in Path(f"/proc/{peer.zygote.pid}/maps").read_text()
        fds = Path(f"/proc/{peer.zygote.pid}/fd").iterdir()
        assert sum("secretmem" in os.readlink(fd) for fd in fds) == 1
    assert len(strict_kms.calls("AssumeRole")) == 1
