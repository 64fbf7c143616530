"""Session credentials in secret memory that processes share: exclusive, replaced whole."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kmsfs import libc
from kmsfs.decryptor.credential_cache import CredentialCache
from kmsfs.keys.credentials import SessionCredentials
from tests.support import forked
from tests.support.mounts import wait_until
from tests.support.process_facts import locked_kib
from tests.support.secret_memory import without_memfd_secret

CREDENTIALS = SessionCredentials(
    access_key="AKID",
    secret_key="hidden-one",
    token="hidden-two",
    account_id=None,
    source="sso",
    ends_at=time.time() + 3600,
)


@pytest.fixture
def cache() -> Iterator[CredentialCache]:
    """An empty one."""
    made = CredentialCache.create()
    if made is None:
        pytest.skip("a kernel without memfd_secret")
    yield made
    made.close()


def test_what_one_process_writes_another_reads(cache: CredentialCache) -> None:
    def write() -> bool:
        with cache.exclusive():
            empty = cache.read() is None
            cache.write(CREDENTIALS)
        return empty

    assert forked.holds(write)
    assert forked.holds(lambda: cache.read() == CREDENTIALS)


def test_writing_nothing_empties_it(cache: CredentialCache) -> None:
    cache.write(CREDENTIALS)
    cache.write(None)
    assert cache.read() is None


def test_only_what_was_meant_is_discarded(cache: CredentialCache) -> None:
    cache.write(CREDENTIALS)
    cache.discard(msgspec.structs.replace(CREDENTIALS, token="other"))
    assert cache.read() == CREDENTIALS
    cache.discard(CREDENTIALS)
    assert cache.read() is None


def test_it_is_mapped_only_while_it_is_used(cache: CredentialCache) -> None:
    before = locked_kib()
    cache.write(CREDENTIALS)
    assert cache.read() == CREDENTIALS
    assert locked_kib() == before
    assert "secretmem" not in Path("/proc/self/maps").read_text()


def test_what_does_not_fit_is_not_kept(cache: CredentialCache) -> None:
    cache.write(CREDENTIALS)
    cache.write(msgspec.structs.replace(CREDENTIALS, token="x" * (16 << 10)))
    assert cache.read() is None


def test_half_written_content_counts_as_none(
    cache: CredentialCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msgspec.json, "encode", lambda _: b'{"access_key": "AK')
    cache.write(CREDENTIALS)
    assert cache.read() is None


def test_where_no_memory_may_be_locked_nothing_is_kept_and_nothing_fails(
    cache: CredentialCache,
) -> None:
    def check() -> bool:
        forked.limit_locked_memory(0)
        with cache.exclusive():
            cache.write(CREDENTIALS)
            return cache.read() is None

    assert forked.holds(check)


def test_one_process_at_a_time_and_the_end_of_one_lets_the_next(cache: CredentialCache) -> None:
    read_end, write_end = os.pipe()

    def hold() -> bool:
        with cache.exclusive():
            os.write(write_end, b"x")
            signal.pause()
        return True

    def take_turn() -> bool:
        with cache.exclusive():
            return True

    holder = forked.start(hold)
    assert os.read(read_end, 1) == b"x"
    waiter = forked.start(take_turn)
    wait_until(lambda: waits_for_a_lock(waiter), "the second process waits for its turn")
    # Whoever finds it taken leaves it alone.
    cache.discard(CREDENTIALS)
    os.kill(holder, signal.SIGKILL)
    assert forked.wait(holder) == -signal.SIGKILL
    assert forked.wait(waiter) == 0
    for fd in (read_end, write_end):
        os.close(fd)


def waits_for_a_lock(pid: int) -> bool:
    """Whether the kernel lists a process as blocked (proc(5), locks)."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any(f" {pid} " in line and "->" in line for line in lines)


def test_there_is_none_without_memfd_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    without_memfd_secret(monkeypatch)
    assert CredentialCache.create() is None


def test_it_takes_no_memory_before_it_is_used(cache: CredentialCache) -> None:
    assert os.fstat(cache._fd).st_size % libc.PAGE_BYTES == 0
    assert os.fstat(cache._fd).st_blocks == 0


def test_credentials_do_not_show_in_a_repr() -> None:
    assert "hidden" not in repr(CREDENTIALS)
    assert "sso" in repr(CREDENTIALS)
