"""`kmsfs why`: what is remembered of a file, and how it is said."""

import pytest
import trio

from kmsfs.admin.explain import gather
from kmsfs.admin.status import FileReport
from kmsfs.cli.why import as_text
from kmsfs.decryptor.client import Plaintext
from kmsfs.errors import KeyAccessDenied, TooManyWaiting
from kmsfs.kms_call import KmsCall
from kmsfs.memory.arena import Arena
from kmsfs.settings import CacheSettings, MountConfig, Ownership
from tests.support.events import Recorder
from tests.support.scripted_volume import Ciphertext, ScriptedSource, scripted_volume
from tests.support.secret_memory import adopt


class Site:
    """A volume in the FUSE view with one file, `a`, that can be decrypted."""

    def __init__(self) -> None:
        self.arena = Arena(1 << 20)
        self.source = ScriptedSource({"a": Ciphertext("a")}, lambda _: None, lambda _: None)
        self.config = MountConfig(
            source="/s",
            mountpoint="/m",
            volume_root="/s",
            ownership=Ownership(uid=0, gid=0),
            cache=CacheSettings(),
            view="fuse",
        )
        self.volume = scripted_volume(
            self.source, self._decrypt, arena=self.arena, events=Recorder(), config=self.config
        )

    async def _decrypt(self, _wanted: Ciphertext, _deadline: float) -> Plaintext:
        return Plaintext(adopt(self.arena, b"x"), "arn:key", "test")

    async def why(self) -> FileReport:
        """What is told of `a`."""
        return await gather(
            self.config, self.volume, "a", in_ram_since_s=None, credential_source=None
        )


@pytest.mark.trio
async def test_an_open_that_never_got_as_far_as_a_decryption_is_told_of() -> None:
    site = Site()
    site.volume.history.note_open("a", error=TooManyWaiting("512 opens wait already"))
    report = await site.why()
    assert (report.state, report.error) == ("failing", "TooManyWaiting")
    assert report.error_age_s is not None


@pytest.mark.trio
async def test_what_shows_from_outside_goes_before_what_was_met() -> None:
    site = Site()
    site.volume.history.note_failure("a", KeyAccessDenied("no"))
    site.source.problems["a"] = "truncated"
    report = await site.why()
    assert (report.error, report.detail) == ("CiphertextInvalid", "truncated")
    assert report.error_age_s is None
    assert "  met " not in as_text(report)


@pytest.mark.trio
async def test_a_plaintext_that_only_an_old_descriptor_reads_is_not_held() -> None:
    site = Site()
    async with trio.open_nursery() as nursery:
        await nursery.start(site.volume.cache.run)
        opened = await site.volume.open_file("a", trio.current_time() + 20)
        assert (await site.why()).held
        site.volume.cache.retire("")
        report = await site.why()
        assert (report.state, report.held) == ("served", False)
        opened.lease.close()
        nursery.cancel_scope.cancel()


def report(**known: object) -> FileReport:
    """Of a file that is served, with what a test adds."""
    base: dict[str, object] = {
        "path": "a",
        "mountpoint": "/m",
        "view": "fuse",
        "state": "served",
        "format": "test",
    }
    return FileReport(**{**base, **known})  # type: ignore[arg-type] # fields of FileReport


def test_a_file_that_was_there_is_told_from_one_that_kms_was_asked_for() -> None:
    held = as_text(report(opened_age_s=1.0, from_cache=True, held=True))
    assert "  opened    1 s ago, from what was held, without asking KMS\n" in held
    asked = as_text(report(opened_age_s=1.0, held=True))
    assert "  opened    1 s ago\n" in asked


def test_who_asked_is_told_with_the_source_of_the_credentials() -> None:
    call = KmsCall(principal="arn:me", access_key_id="AKIA", request_id="r-1", key_id="arn:key")
    text = as_text(report(call=call, credential_source="environment"))
    assert "  asked by  arn:me, access key AKIA, credentials: environment\n" in text
    assert "  request   r-1\n" in text
    assert "  key       arn:key\n" in text
    assert "credentials" not in as_text(report(call=call))


@pytest.mark.parametrize(
    ("seconds", "words"), [(59.0, "59 s"), (61.0, "1 min"), (3540.0, "59 min"), (5400.0, "1.5 h")]
)
def test_times_are_told_in_units_that_fit(seconds: float, words: str) -> None:
    text = as_text(report(state="failing", error="KeyAccessDenied", error_age_s=seconds))
    assert f"  met       {words} ago\n" in text


def test_names_and_details_reach_no_terminal_raw() -> None:
    text = as_text(report(path="a\x1b[2J", error="KeyAccessDenied", detail="\x1b]0;title\x07"))
    assert "\x1b" not in text
    assert "\x07" not in text
