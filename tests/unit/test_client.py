"""The daemon's end, against real processes that die, hang or answer nonsense."""

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kmsfs.decryptor import pool as pool_module
from kmsfs.decryptor.breaker import FAILURES_TO_OPEN
from kmsfs.decryptor.client import MAX_CALLS_PER_KEY, DecryptorClient, Plaintext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.decryptor.worker import version_of
from kmsfs.errors import (
    CredentialsUnavailable,
    DeadlineExceeded,
    GuaranteeNotMet,
    KeyUnusable,
    KmsUnreachable,
    LockedMemoryExhausted,
    WorkerBug,
    WorkerFailed,
)
from kmsfs.events import ConfinementWeak, WorkerEnded
from kmsfs.formats.binding import Place
from kmsfs.memory.arena import Arena
from tests.support import scripted_zygote
from tests.support.events import Recorder
from tests.support.eventually import eventually
from tests.support.limits import no_descriptor_left
from tests.support.process_facts import locked_kib, open_fds
from tests.support.secret_memory import content_of

CIPHERTEXT = b"ciphertext of the test " * 100
PLAINTEXT = CIPHERTEXT[::-1]


class Site:
    """A client with scripted zygotes: each list of steps is for one zygote, the last for good."""

    def __init__(self, nursery: trio.Nursery, path: Path, scripts: list[list[str]]) -> None:
        self.events = Recorder()
        self.arena = Arena(1 << 20)
        self.zygotes: list[subprocess.Popen[bytes]] = []
        self.client = DecryptorClient(
            self.arena, self.events, request_zygote=lambda: nursery.start_soon(self.bring_zygote)
        )
        self.path = path
        self._scripts = scripts

    async def bring_zygote(self) -> None:
        """What the launcher does when a zygote is wanted."""
        if self.client.workers.has_zygote:
            return
        steps = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygotes.append(scripted_zygote.start(theirs, steps))
        self.client.workers.attach_zygote(ours)

    async def decrypt(self, *, seconds: float = 20.0, key: str = "key") -> Plaintext:
        """Decrypt the test's file."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return await self.client.decrypt(
                fd,
                DecryptRules(place=Place(None, "file")),
                version_of(fd),
                key=key,
                deadline=trio.current_time() + seconds,
            )
        finally:
            os.close(fd)

    async def decrypt_and_wipe(self) -> bytes:
        """The plaintext's content; its slot is gone."""
        plaintext = await self.decrypt()
        content = content_of(plaintext.slot)
        plaintext.slot.wipe()
        return content


Open = Callable[..., contextlib.AbstractAsyncContextManager[Site]]


@pytest.fixture
def site(tmp_path: Path) -> Open:
    """Opens a `Site`; at its end no memory, descriptor or process of it may be left."""
    path = tmp_path / "file.encrypted"
    path.write_bytes(CIPHERTEXT)

    @contextlib.asynccontextmanager
    async def open_site(*scripts: list[str]) -> AsyncIterator[Site]:
        async with trio.open_nursery() as outer:
            found = Site(outer, path, list(scripts))
            await outer.start(found.client.workers.run)
            fds, locked = open_fds(), locked_kib()
            try:
                yield found
                await found.client.workers.end_all()
                found.client.workers.drop_zygote()
                assert (found.arena.used_bytes, found.arena.slots) == (0, 0)
                assert locked_kib() == locked
                assert open_fds() == fds
            finally:
                outer.cancel_scope.cancel()
                for zygote in found.zygotes:
                    zygote.kill()
                    zygote.wait()

    return open_site


@pytest.mark.trio
async def test_a_plaintext_arrives_in_its_slot_and_the_worker_serves_again(site: Open) -> None:
    async with site(["serve"]) as s:
        plaintext = await s.decrypt()
        assert content_of(plaintext.slot) == PLAINTEXT
        assert (plaintext.key_arn, plaintext.format) == ("arn:key", "scripted")
        assert plaintext.slot.kind in ("memfd_secret", "memfd")
        plaintext.slot.wipe()
        pids = s.client.workers.pids
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert s.client.workers.pids == pids
        assert len(pids) == 1
        assert s.client.worker_report == scripted_zygote.REPORT
        greeting = s.client.workers.greeting
        assert greeting is not None
        assert greeting.pid == s.zygotes[0].pid
        assert s.events.events == []


@pytest.mark.trio
async def test_an_empty_plaintext_needs_no_memory(site: Open) -> None:
    async with site(["serve"]) as s:
        s.path.write_bytes(b"")
        plaintext = await s.decrypt()
        assert (plaintext.slot.size_bytes, s.arena.slots) == (0, 0)


_LOSSES = [
    "die",
    "die-at-once",
    "garbage",
    "another-message",
    "wrong-id",
    "wrong-size",
    "no-memory",
    "memory-for-nothing",
    "unsealed",
    "write-sealed",
    "failed-with-descriptor",
]


@pytest.mark.trio
@pytest.mark.parametrize("step", _LOSSES)
async def test_a_lost_worker_costs_one_transparent_retry(site: Open, step: str) -> None:
    async with site([step, "serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert len(s.events.of(WorkerEnded)) == 1


@pytest.mark.trio
@pytest.mark.parametrize("step", _LOSSES)
async def test_two_lost_workers_are_an_error_and_the_next_request_is_served(
    site: Open, step: str
) -> None:
    async with site([step, step, "serve"]) as s:
        with pytest.raises(WorkerFailed, match="two workers were lost"):
            await s.decrypt()
        assert await s.decrypt_and_wipe() == PLAINTEXT
        # The lost ones are killed, and end in their own time.
        await eventually(lambda: len(s.client.workers.pids) == 1)


@pytest.mark.trio
async def test_a_hung_worker_is_killed_in_time_for_one_more_try(site: Open) -> None:
    async with site(["hang", "serve"]) as s:
        with trio.fail_after(10):
            plaintext = await s.decrypt(seconds=3)
        assert content_of(plaintext.slot) == PLAINTEXT
        plaintext.slot.wipe()
        (ended,) = s.events.of(WorkerEnded)
        assert isinstance(ended, WorkerEnded)
        assert ended.reason == "no answer in time"


@pytest.mark.trio
async def test_workers_that_all_hang_end_with_the_deadline(site: Open) -> None:
    async with site(["hang"]) as s:
        started = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            await s.decrypt(seconds=1.0)
        assert 0.9 < trio.current_time() - started < 3


@pytest.mark.trio
async def test_a_refusal_comes_through_with_its_class_and_costs_no_worker(site: Open) -> None:
    async with site(["KeyUnusable:the key is disabled"]) as s:
        with pytest.raises(KeyUnusable, match="the key is disabled"):
            await s.decrypt()
        pids = s.client.workers.pids
        with pytest.raises(KeyUnusable):
            await s.decrypt()
        assert s.client.workers.pids == pids
        assert s.events.events == []


@pytest.mark.trio
async def test_an_error_nobody_knows_is_a_bug_not_a_crash(site: Open) -> None:
    async with site(["SystemExit:0"]) as s:
        with pytest.raises(WorkerBug, match="SystemExit"):
            await s.decrypt()


@pytest.mark.trio
async def test_a_plaintext_without_room_is_an_error_of_its_own_request(site: Open) -> None:
    async with site(["serve"]) as s:
        s.path.write_bytes(b"x" * (s.arena.budget_bytes + 1))
        with pytest.raises(LockedMemoryExhausted):
            await s.decrypt()
        s.path.write_bytes(CIPHERTEXT)
        assert await s.decrypt_and_wipe() == PLAINTEXT


@pytest.mark.trio
@pytest.mark.parametrize("left", [0, 2])
async def test_without_descriptors_a_request_fails_and_the_zygote_is_kept(
    site: Open, left: int
) -> None:
    async with site(["serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        await s.client.workers.end_all()
        with s.path.open("rb") as file:
            version = version_of(file.fileno())
            rules = DecryptRules(place=Place(None, "file"))
            with no_descriptor_left(but=left), pytest.raises(WorkerFailed, match="no new process"):
                await s.client.decrypt(
                    file.fileno(), rules, version, key="key", deadline=trio.current_time() + 20
                )
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert len(s.zygotes) == 1


@pytest.mark.trio
@pytest.mark.parametrize("step", ["zygote-dies", "no-pidfd", "greet-nonsense"])
async def test_a_zygote_that_fails_is_replaced_within_the_request(site: Open, step: str) -> None:
    async with site([step], ["serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert len(s.zygotes) == 2


@pytest.mark.trio
async def test_a_hung_zygote_is_replaced_within_the_request(
    site: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_SPAWN_S", 0.3)
    async with site(["zygote-hangs"], ["serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert len(s.zygotes) == 2


@pytest.mark.trio
async def test_a_refused_fork_costs_one_transparent_retry(site: Open) -> None:
    async with site(["no-fork", "serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT


@pytest.mark.trio
async def test_a_worker_killed_while_idle_is_noticed_before_it_is_used(site: Open) -> None:
    async with site(["serve"]) as s:
        await s.decrypt_and_wipe()
        (pid,) = s.client.workers.pids
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert s.events.events == []


@pytest.mark.trio
async def test_dropping_a_zygote_that_is_still_starting_harms_nobody(site: Open) -> None:
    async with site(["serve"]) as s:
        await s.bring_zygote()
        await trio.testing.wait_all_tasks_blocked()
        s.client.workers.drop_zygote()
        await trio.testing.wait_all_tasks_blocked()
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert len(s.zygotes) == 2


@pytest.mark.trio
async def test_ending_the_zygote_returns_once_it_has_ended(site: Open) -> None:
    async with site(["serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        await s.client.workers.end_zygote()
        assert not s.client.workers.has_zygote
        assert s.zygotes[0].wait(1) == 0
        await s.client.workers.end_zygote()
        assert await s.decrypt_and_wipe() == PLAINTEXT


@pytest.mark.trio
async def test_ending_a_zygote_that_is_still_starting_waits_for_it(site: Open) -> None:
    async with site(["serve"]) as s:
        await s.bring_zygote()
        await s.client.workers.end_zygote()
        assert s.zygotes[0].wait(1) == 0


@pytest.mark.trio
async def test_a_zygote_that_does_not_end_is_told(
    site: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_REAP_S", 0.2)
    async with site(["serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        s.zygotes[0].send_signal(signal.SIGSTOP)
        with pytest.raises(GuaranteeNotMet, match="credentials"):
            await s.client.workers.end_zygote()


@pytest.mark.trio
async def test_a_worker_that_takes_no_more_requests_is_not_asked_again(site: Open) -> None:
    async with site(["serve-last", "serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        first = set(s.client.workers.pids)
        assert await s.decrypt_and_wipe() == PLAINTEXT
        # It ends in its own time.
        await eventually(lambda: not first & set(s.client.workers.pids))
        assert s.events.events == []


@pytest.mark.trio
async def test_refused_credentials_that_were_kept_cost_another_worker_and_no_error(
    site: Open,
) -> None:
    async with site(["ask-another", "ask-another", "ask-another", "serve"]) as s:
        assert await s.decrypt_and_wipe() == PLAINTEXT
        assert s.events.events == []


@pytest.mark.trio
async def test_workers_that_all_ask_for_another_are_not_asked_for_ever(site: Open) -> None:
    async with site(["ask-another"]) as s:
        with pytest.raises(CredentialsUnavailable):
            await s.decrypt()


@pytest.mark.trio
async def test_workers_that_are_not_fully_confined_are_told_of_once(site: Open) -> None:
    async with site(["serve-unconfined"]) as s:
        for _ in range(2):
            assert await s.decrypt_and_wipe() == PLAINTEXT
        assert s.events.events == [ConfinementWeak("workers", ("open",))]


@pytest.mark.trio
async def test_end_all_leaves_no_worker_alive(site: Open) -> None:
    async with site(["serve"]) as s:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(s.decrypt_and_wipe)
        pidfds = [os.pidfd_open(pid) for pid in s.client.workers.pids]
        assert pidfds
        await s.client.workers.end_all()
        assert s.client.workers.pids == ()
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(0)
            os.close(pidfd)


@pytest.mark.trio
async def test_a_cancelled_request_ends_its_worker_and_leaves_no_slot(site: Open) -> None:
    async with site(["hang", "serve"]) as s:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.decrypt)
            await eventually(lambda: bool(s.client.workers.pids))
            nursery.cancel_scope.cancel()
        await eventually(lambda: not s.client.workers.pids)
        assert await s.decrypt_and_wipe() == PLAINTEXT


async def _most_at_once(s: Site, calls: list[Callable[[], Awaitable[object]]]) -> int:
    """How many workers live while these calls hang."""
    most = 0
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)
        with trio.move_on_after(1.5):
            while True:
                most = max(most, len(s.client.workers.pids))
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    return most


@pytest.mark.trio
async def test_one_key_leaves_room_for_others(site: Open) -> None:
    async with site(["hang"]) as s:
        assert await _most_at_once(s, [s.decrypt] * 12) == 4


@pytest.mark.trio
async def test_all_keys_together_are_bounded(site: Open) -> None:
    async with site(["hang"]) as s:

        def call(key: str) -> Callable[[], Awaitable[object]]:
            return lambda: s.decrypt(key=key)

        assert await _most_at_once(s, [call(f"key {n % 6}") for n in range(24)]) == 8


@pytest.mark.trio
async def test_waiting_for_a_turn_counts_in_the_deadline(site: Open) -> None:
    async with site(["hang"]) as s, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(s.decrypt)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5), pytest.raises(DeadlineExceeded):
            await s.decrypt(seconds=0.2)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_idle_workers_end_by_themselves(site: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_WORKER_S", 0.2)
    async with site(["serve"]) as s:
        await s.decrypt_and_wipe()
        await eventually(lambda: not s.client.workers.pids)
        assert s.events.events == []


@pytest.mark.trio
async def test_a_worker_serves_a_bounded_number_of_requests(
    site: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_REQUESTS_PER_WORKER", 3)
    async with site(["serve"]) as s:
        seen = set()
        for _ in range(6):
            plaintext = await s.decrypt()
            plaintext.slot.wipe()
            seen |= set(s.client.workers.pids)
        assert len(seen) >= 2


@pytest.mark.trio
async def test_after_some_failures_in_a_row_a_key_fails_at_once_and_others_do_not(
    site: Open,
) -> None:
    async with site(["KmsUnreachable:no route"]) as s:
        # By chance the next probe could be due at once.
        s.client.breakers._dice = lambda: 1.0
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(KmsUnreachable, match=r"^no route$"):
                await s.decrypt()
        s.zygotes[0].kill()
        with pytest.raises(KmsUnreachable, match=r"^not asked: .*: no route$"):
            await s.decrypt()
        with pytest.raises(DeadlineExceeded):
            await s.decrypt(key="other", seconds=0.0)


@pytest.mark.trio
async def test_whoever_waits_behind_a_hanging_key_fails_when_its_breaker_opens(site: Open) -> None:
    async with site(["hang"]) as s:
        errors: list[KmsUnreachable] = []

        async def decrypt(seconds: float) -> None:
            with pytest.raises(KmsUnreachable) as caught:
                await s.decrypt(seconds=seconds)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_CALLS_PER_KEY):
                nursery.start_soon(decrypt, 0.6)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(20):
                nursery.start_soon(decrypt, 8.0)
        # All but a probe, and those whose turn came between the first failure and the third.
        assert sum(error.again_in_s is not None for error in errors) >= 20 - FAILURES_TO_OPEN
