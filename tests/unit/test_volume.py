"""The volume: newest version, rules for its decryption, retries; on a real source."""

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kmsfs.decryptor.client import DecryptorClient, Plaintext
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    CiphertextChanging,
    DeadlineExceeded,
    FileTooLarge,
    KmsfsError,
    LockedMemoryExhausted,
    NameConflict,
    SourceMissing,
    VolumeLocked,
)
from kmsfs.formats.binding import Place
from kmsfs.libc import PAGE_BYTES
from kmsfs.memory.arena import Arena
from kmsfs.settings import CacheSettings, KmsSettings, MountConfig, Ownership
from kmsfs.store.ciphertext import FileVersion
from kmsfs.store.source import Source, SourceFile
from kmsfs.store.volume import OpenedFile, Volume
from tests.support import scripted_zygote
from tests.support.events import Recorder
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.process_facts import open_fds
from tests.support.scripted_volume import Ciphertext, ScriptedSource, scripted_volume
from tests.support.sdk_messages import sdk_message
from tests.support.secret_memory import adopt

BLOB = LocalKeys().encrypt(b"a password", key_id=key_arn(1), encryption_context={}).ciphertext

Open = Callable[..., contextlib.AbstractAsyncContextManager[Volume]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The volume's root, with a subdirectory `served`."""
    (tmp_path / "served").mkdir()
    return tmp_path


@pytest.fixture
def volume(root: Path) -> Open:
    """Opens a volume over `root`; its workers follow steps, and reverse what they are given."""

    @contextlib.asynccontextmanager
    async def open_volume(
        *steps: str, source: str = "", **changes: object
    ) -> AsyncIterator[Volume]:
        config = MountConfig(
            source=str(root / source),
            mountpoint="/m",
            volume_root=str(root),
            ownership=Ownership(uid=0, gid=0),
            **changes,  # type: ignore[arg-type] # fields of MountConfig
        )
        events, arena = Recorder(), Arena(1 << 20)
        client = DecryptorClient(arena, events, request_zygote=lambda: None)
        found = Volume(config, Source(config.source), arena, client, events)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote = scripted_zygote.start(theirs, list(steps) or ["serve"])
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(client.workers.run)
                await nursery.start(found.cache.run)
                client.workers.attach_zygote(ours)
                yield found
                nursery.cancel_scope.cancel()
        finally:
            found.source.close()
            zygote.wait()
        assert arena.slots == 0

    return open_volume


def in_time() -> float:
    """A deadline that nobody reaches."""
    return trio.current_time() + 20


@pytest.mark.trio
async def test_an_open_file_shows_its_exact_size_and_so_does_the_source(
    root: Path, volume: Open
) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume() as v:
        node = await v.node_at("a")
        assert isinstance(node, SourceFile)
        assert not node.size_exact
        opened = await v.open_file("a", in_time())
        assert (opened.file.size_bytes, opened.file.size_exact) == (len(BLOB), True)
        assert opened.lease.size_bytes == len(BLOB)
        assert not opened.from_cache
        opened.lease.close()
        node = await v.node_at("a")
        assert isinstance(node, SourceFile)
        assert (node.size_bytes, node.size_exact) == (len(BLOB), True)
        again = await v.open_file("a", in_time())
        assert again.from_cache
        again.lease.close()


@pytest.mark.trio
async def test_what_is_not_there_or_there_twice_is_told(root: Path, volume: Open) -> None:
    (root / "twice.kms").write_bytes(BLOB)
    (root / "twice.encrypted").write_bytes(BLOB)
    async with volume() as v:
        with pytest.raises(SourceMissing):
            await v.open_file("nothing", in_time())
        with pytest.raises(SourceMissing):
            await v.open_file("served", in_time())
        with pytest.raises(NameConflict, match=r"twice\.encrypted, twice\.kms"):
            await v.open_file("twice", in_time())


@pytest.mark.trio
async def test_a_change_while_it_is_read_is_tried_once_more(
    root: Path, volume: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume("CiphertextChanging:meanwhile") as v:
        assert await v.node_at("a")
        opened: list[str] = []
        really_open = v.source.open_ciphertext

        def count(path: str) -> tuple[int, FileVersion]:
            opened.append(path)
            return really_open(path)

        monkeypatch.setattr(v.source, "open_ciphertext", count)
        with pytest.raises(CiphertextChanging):
            await v.open_file("a", in_time())
        assert opened == ["a.kms", "a.kms"]


@pytest.mark.trio
async def test_a_file_replaced_meanwhile_is_opened_in_its_newer_version(
    root: Path, volume: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume() as v:
        really_open = v.source.open_ciphertext
        newer = [BLOB + b"newer"]

        def replace_and_open(path: str) -> tuple[int, FileVersion]:
            if newer:
                (root / "new").write_bytes(newer.pop())
                (root / "new").rename(root / "a.kms")
            return really_open(path)

        monkeypatch.setattr(v.source, "open_ciphertext", replace_and_open)
        opened = await v.open_file("a", in_time())
        assert opened.lease.size_bytes == len(BLOB + b"newer")
        opened.lease.close()


@pytest.mark.trio
async def test_an_open_ends_with_its_deadline(root: Path, volume: Open) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume("hang") as v:
        with pytest.raises(DeadlineExceeded):
            await v.open_file("a", trio.current_time() + 0.5)


@pytest.mark.trio
async def test_a_file_known_to_be_too_large_never_reaches_a_worker(
    root: Path, volume: Open
) -> None:
    (root / "a.encrypted").write_bytes(sdk_message(LocalKeys(), b"x" * 2000))
    async with volume("hang", cache=CacheSettings(max_file_bytes=1999)) as v:
        with pytest.raises(FileTooLarge, match="2000 bytes, 1999 at most"):
            await v.open_file("a", in_time())


@pytest.mark.trio
async def test_a_locked_volume_shows_metadata_only(root: Path, volume: Open) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume() as v:
        await v.lock()
        await v.lock()
        with pytest.raises(VolumeLocked):
            await v.open_file("a", in_time())
        assert [node.path for node in await v.list_directory("")] == ["a", "served"]
        v.unlock()
        opened = await v.open_file("a", in_time())
        opened.lease.close()


@pytest.mark.trio
async def test_rules_speak_of_the_volume_not_of_the_part_that_is_served(
    root: Path, volume: Open
) -> None:
    (root / "served" / "bound.kms").write_bytes(BLOB)
    (root / "served" / "free.kms").write_bytes(BLOB)
    kms = KmsSettings(key_ids=("arn:1",), encryption_context={"k": "v"})
    async with volume(
        source="served",
        volume="web",
        binding_required=True,
        unbound=("served/free",),
        kms=kms,
        cache=CacheSettings(max_file_bytes=77),
    ) as v:
        rules = {
            name: v._rules_for(node)
            for name in ("bound", "free")
            if isinstance(node := await v.node_at(name), SourceFile)
        }
    assert rules["bound"] == DecryptRules(
        key_ids=("arn:1",),
        encryption_context={"k": "v"},
        place=Place("web", "served/bound"),
        binding_required=True,
        unknown_as_blob=True,
        max_plaintext_bytes=77,
    )
    assert not rules["free"].binding_required


@pytest.mark.trio
async def test_leaving_a_disk_that_hangs_leaves_no_descriptor(
    root: Path, volume: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.kms").write_bytes(BLOB)
    async with volume() as v:
        monkeypatch.setattr(v.source, "is_local", False)
        entered, leave, left = threading.Event(), threading.Event(), threading.Event()
        really_open = Source.open_ciphertext

        def open_slowly(source: Source, path: str) -> object:
            entered.set()
            leave.wait(20)
            try:
                return really_open(source, path)
            finally:
                left.set()

        monkeypatch.setattr(Source, "open_ciphertext", open_slowly)
        before = open_fds()
        with trio.move_on_after(0.2):
            await v._open_ciphertext("a.kms")
        assert entered.is_set()
        leave.set()
        await trio.to_thread.run_sync(left.wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert open_fds() == before


@pytest.mark.trio
async def test_a_plaintext_past_its_time_is_served_when_kms_lets_the_deadline_pass(
    mock_clock: trio.testing.MockClock,
) -> None:
    answers = [b"a password"]
    arena = Arena(1 << 20)

    async def decrypt(_wanted: Ciphertext, deadline: float) -> Plaintext:
        if answers:
            return Plaintext(adopt(arena, answers.pop()), "arn:key", "test")
        await trio.sleep_until(deadline)
        raise DeadlineExceeded("nothing came")

    v = scripted_volume(
        ScriptedSource({"a": Ciphertext("a")}, lambda _: None, lambda _: None),
        decrypt,
        arena=arena,
        cache=CacheSettings(ttl_s=10.0, idle_s=100.0, stale_s=100.0),
        events=Recorder(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(v.cache.run)
        (await v.open_file("a", in_time())).lease.close()
        mock_clock.jump(11.0)
        mock_clock.autojump_threshold = 0
        opened = await v.open_file("a", trio.current_time() + 8.0)
        assert opened.from_cache
        assert opened.lease.size_bytes == len(b"a password")
        opened.lease.close()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_of_many_files_each_waits_for_memory_that_the_others_give_back() -> None:
    names = [f"file-{number}" for number in range(12)]
    arena = Arena(2 * PAGE_BYTES)
    known = {name: None if number % 2 else PAGE_BYTES for number, name in enumerate(names)}

    async def decrypt(_wanted: Ciphertext, _deadline: float) -> Plaintext:
        await trio.lowlevel.checkpoint()
        return Plaintext(adopt(arena, b"x" * PAGE_BYTES), "arn:key", "test")

    v = scripted_volume(
        ScriptedSource(
            {name: Ciphertext(name) for name in names},
            lambda _: None,
            lambda found: known[found.path],
        ),
        decrypt,
        arena=arena,
        cache=CacheSettings(ttl_s=0.0, idle_s=0.0, stale_s=0.0),
        events=Recorder(),
    )
    outcomes: dict[str, KmsfsError | None] = {}

    async def take(_opened: OpenedFile) -> None:
        await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        await nursery.start(v.cache.run)
        await v.open_each(names, take=take, ended=outcomes.__setitem__)
        assert outcomes == dict.fromkeys(names)
        held = [await v.open_file(name, in_time()) for name in names[:2]]
        await v.open_each(names[2:], take=take, ended=outcomes.__setitem__)
        found = [type(outcomes[name]) for name in names[2:]]
        assert found == [LockedMemoryExhausted] * 10
        for opened in held:
            opened.lease.close()
        nursery.cancel_scope.cancel()
