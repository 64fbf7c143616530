"""Zygote and worker as real processes, spoken to frame by frame, against the strict KMS."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.decryptor import wire
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.decryptor.worker import Outbox, read_ciphertext, version_of
from kmsfs.errors import CiphertextChanging, FileTooLarge, SourceUnreadable, WorkerBug
from kmsfs.formats.binding import PATH_KEY, Place
from kmsfs.memory.arena import Arena
from kmsfs.memory.mapping import LockedMapping, check_received
from tests.support import canary
from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.peers import Peer, running_peer
from tests.support.process_facts import locked_kib, open_fds
from tests.support.secret_memory import content_of, second_look, without_memfd_secret
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms

PLAINTEXT = canary.secret("worker", 300)


@pytest.fixture
def peer(strict_kms: StrictKms) -> Iterator[Peer]:
    """A worker that may call `strict_kms`; zygote and worker must end by themselves."""
    with running_peer(strict_kms.env(), strict_kms.endpoint_url) as found:
        yield found


@pytest.fixture
def rules(kms_key: KmsKey) -> DecryptRules:
    """Rules that allow the test's key."""
    return DecryptRules(key_ids=(kms_key.arn,), place=Place(None, "file"))


@pytest.fixture
def blob(tmp_path: Path, kms_key: KmsKey) -> Path:
    """PLAINTEXT as a bare blob."""
    path = tmp_path / "file.kms"
    path.write_bytes(kms_key.seal(PLAINTEXT, {}))
    return path


def test_a_blob_is_handed_over_in_secret_memory(
    peer: Peer, blob: Path, rules: DecryptRules, kms_key: KmsKey
) -> None:
    for _ in range(3):
        request = peer.request(blob, rules)
        decrypted, fd = wire.expect(peer.answer(), wire.Decrypted)
        assert (decrypted.id, decrypted.size_bytes) == (request.id, len(PLAINTEXT))
        assert (decrypted.key_arn, decrypted.format) == (kms_key.arn, "kms-blob")
        slot = Arena(1 << 20).adopt(fd, decrypted.size_bytes)
        wire.send(peer.sock, wire.Taken(id=request.id))
        assert content_of(slot) == PLAINTEXT
        slot.wipe()
        assert decrypted.report.undumpable
        assert decrypted.report.core_limit_zero
        assert decrypted.report.allocator_scrubs
        assert decrypted.report.memory_locked == (os.geteuid() == 0 or locked_kib(peer.pid) > 0)


def test_each_request_has_a_deadline_of_its_own(
    strict_kms: StrictKms,
    kms_key: KmsKey,
    fault_proxy: FaultProxy,
    blob: Path,
    rules: DecryptRules,
) -> None:
    with running_peer(strict_kms.env(), fault_proxy.endpoint_url) as peer:
        fault_proxy.inject(Fault.HANG, times=1)
        code, _ = peer.failure(blob, rules, deadline_s=0.3)
        assert code in ("DeadlineExceeded", "KmsUnreachable")
        fault_proxy.heal()
        kms_key.latency_s = 0.6
        request = peer.request(blob, rules, deadline_s=20)
        _, fd = wire.expect(peer.answer(), wire.Decrypted)
        assert fd is not None
        os.close(fd)
        wire.send(peer.sock, wire.Taken(id=request.id))


def test_a_failure_is_told_by_its_code_and_the_worker_serves_on(
    peer: Peer, blob: Path, rules: DecryptRules, tmp_path: Path
) -> None:
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"neither blob nor message")
    assert peer.failure(nonsense, rules)[0] == "FormatUnknown"
    strict = DecryptRules(key_ids=rules.key_ids, place=rules.place, binding_required=True)
    assert peer.failure(blob, strict)[0] == "NotBound"
    small = DecryptRules(key_ids=rules.key_ids, place=rules.place, max_plaintext_bytes=100)
    assert peer.failure(blob, small)[0] == "FileTooLarge"
    assert peer.failure(blob, rules, stale=True)[0] == "CiphertextChanging"
    assert not peer.zygote.poll()


def test_a_detail_longer_than_a_frame_is_cut(
    peer: Peer, rules: DecryptRules, tmp_path: Path, kms_key: KmsKey
) -> None:
    key = WrittenKey(b"aws-kms", kms_key.arn.encode(), b"x")
    writer = EsdkWriter(os.urandom(32), [key], context={PATH_KEY: "\n" * 60_000})
    path = tmp_path / "file.encrypted"
    path.write_bytes(writer.message(b"content"))
    code, detail = peer.failure(path, rules)
    assert code == "ContextMismatch"
    assert len(detail) <= 1000


def test_a_pipe_in_place_of_a_file_is_refused_at_once(peer: Peer, rules: DecryptRules) -> None:
    read_end, write_end = os.pipe()
    message = wire.Decrypt(id=1, rules=rules, version=version_of(read_end), deadline_s=5)
    wire.send(peer.sock, message, [read_end])
    failed, _ = wire.expect(peer.answer(), wire.Failed)
    assert failed.code == "SourceUnreadable"
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("acknowledged", [None, 1000])
def test_a_plaintext_that_nobody_takes_is_wiped(
    peer: Peer, blob: Path, rules: DecryptRules, acknowledged: int | None
) -> None:
    request = peer.request(blob, rules)
    decrypted, fd = wire.expect(peer.answer(), wire.Decrypted)
    assert fd is not None
    mapping = LockedMapping.of(fd, check_received(fd, decrypted.size_bytes))
    os.close(fd)
    if acknowledged is not None:
        wire.send(peer.sock, wire.Taken(id=request.id + acknowledged))
    peer.sock.close()
    assert peer.ended()
    view = mapping.borrow(len(PLAINTEXT))
    assert bytes(view) == bytes(len(PLAINTEXT))
    mapping.take_back(view)
    mapping.close()


@pytest.mark.parametrize("frame", [b"", b"\x01garbage", wire.encode(wire.Taken(id=1))])
def test_a_peer_that_breaks_the_protocol_is_left(peer: Peer, frame: bytes) -> None:
    peer.sock.send(frame)
    assert peer.ended()


def test_workers_end_with_their_zygote(
    strict_kms: StrictKms, blob: Path, rules: DecryptRules
) -> None:
    with running_peer(strict_kms.env(), strict_kms.endpoint_url) as peer:
        # It is at work by now, and has asked for its parent's signal.
        assert peer.failure(blob, rules, stale=True)[0] == "CiphertextChanging"
        os.kill(peer.pid, signal.SIGSTOP)
        peer.control.close()
        assert peer.zygote.wait(10) == 0
        assert peer.ended()


def test_processes_are_hardened_and_the_worker_holds_only_its_own_socket(
    peer: Peer, blob: Path, rules: DecryptRules
) -> None:
    # Once it has answered, it has closed what it was forked with.
    assert peer.failure(blob, rules, stale=True)[0] == "CiphertextChanging"
    assert peer.greeting.pid == peer.zygote.pid
    assert peer.greeting.credential_source == "environment"
    assert peer.greeting.report.undumpable
    sockets = [
        name
        for name in os.listdir(f"/proc/{peer.pid}/fd")
        if os.readlink(f"/proc/{peer.pid}/fd/{name}").startswith("socket:")
    ]
    assert len(sockets) == 1


# --- parts, in this process -----------------------------------------------------------------------


def test_reading_wants_the_version_that_was_announced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    version = version_of(fd)
    assert read_ciphertext(fd, version, 3) == b"abc"
    with pytest.raises(FileTooLarge):
        read_ciphertext(fd, version, 2)
    path.write_bytes(b"other")
    with pytest.raises(CiphertextChanging):
        read_ciphertext(fd, version, 100)
    os.close(fd)


def test_reading_a_directory_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(SourceUnreadable):
        read_ciphertext(fd, version_of(fd), 1 << 20)
    os.close(fd)


@pytest.mark.parametrize("wipe", [True, False])
def test_an_outbox_wipes_unless_the_memory_was_taken_over(
    monkeypatch: pytest.MonkeyPatch, wipe: bool
) -> None:
    without_memfd_secret(monkeypatch)
    locked, fds = locked_kib(), open_fds()
    outbox = Outbox()
    view = outbox.allocate(6)
    view[:] = b"secret"
    assert outbox.fd is not None
    with second_look(outbox.fd) as look:
        outbox.let_go(wipe=wipe)
        outbox.let_go(wipe=wipe)
        assert look[:6] == (bytes(6) if wipe else b"secret")
    assert (locked_kib(), open_fds()) == (locked, fds)


def test_an_outbox_is_for_one_plaintext() -> None:
    outbox = Outbox()
    assert outbox.allocate(0).nbytes == 0
    assert outbox.fd is None
    outbox.allocate(5)
    with pytest.raises(WorkerBug):
        outbox.allocate(5)
    outbox.let_go(wipe=True)
