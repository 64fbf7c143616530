"""Which files the ramfs shows next, decided without touching anything."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmsfs.errors import (
    CiphertextInvalid,
    CredentialsUnavailable,
    FileTooLarge,
    KeyAccessDenied,
    KmsAnswerInvalid,
    KmsfsError,
    KmsUnreachable,
    RamLimitReached,
    WorkerFailed,
)
from kmsfs.formats.detect import Format
from kmsfs.memory.mapping import round_to_pages
from kmsfs.settings import CacheSettings
from kmsfs.store.source import SourceFile, Survey
from kmsfs.views import ram_plan
from kmsfs.views.ram_plan import NextSet, Outcome, RamFile, Trouble

NOW = 1000.0
CACHE = CacheSettings(ttl_s=100.0, stale_s=50.0, max_bytes=10 * 4096)
AWAY = KmsUnreachable("no answer")
DENIED = KeyAccessDenied("no")


def source_file(
    path: str, version: int = 1, *, size_bytes: int = 100, exact: bool = True, problem: str = ""
) -> SourceFile:
    return SourceFile(
        path=path,
        source_path=path + ".encrypted",
        version=(1, 2, 3, 4, version),
        format=Format.ESDK,
        size_bytes=size_bytes,
        size_exact=exact,
        key="key",
        bound=True,
        suffix_taken=True,
        problem=problem,
    )


def ram_file(path: str, version: int = 1, *, at: float = NOW, size_bytes: int = 100) -> RamFile:
    return RamFile(
        source_path=path + ".encrypted",
        version=(1, 2, 3, 4, version),
        size_bytes=size_bytes,
        decrypted_at_s=at,
    )


def survey(*files: SourceFile, unreadable: tuple[str, ...] = ()) -> Survey:
    return Survey(files=files, directories=(), unreadable=unreadable, ignored=())


def settled(
    files: list[SourceFile],
    shown: dict[str, RamFile],
    outcomes: dict[str, Outcome],
    cache: CacheSettings = CACHE,
) -> NextSet:
    found = survey(*files)
    decided = ram_plan.plan(found, shown, {}, cache, NOW)
    assert {file.path for file in decided.ask} == outcomes.keys()
    return ram_plan.settle(found, decided, outcomes, shown, cache=cache, now=NOW)


def test_only_new_changed_and_expired_files_are_asked_for() -> None:
    shown = {
        "same": ram_file("same"),
        "changed": ram_file("changed", 1),
        "expired": ram_file("expired", at=NOW - 100),
    }
    found = survey(
        source_file("same"), source_file("changed", 2), source_file("expired"), source_file("new")
    )
    decided = ram_plan.plan(found, shown, {}, CACHE, NOW)
    assert [file.path for file in decided.ask] == ["changed", "expired", "new"]
    assert decided.keep == {"same": shown["same"]}
    forever = CacheSettings(ttl_s=0.0)
    assert [file.path for file in ram_plan.plan(found, shown, {}, forever, NOW).ask] == [
        "changed",
        "new",
    ]


def test_hopeless_files_are_not_asked_for() -> None:
    decided = ram_plan.plan(survey(source_file("cut", problem="cut")), {}, {}, CACHE, NOW)
    assert decided.ask == ()
    assert isinstance(decided.known["cut"], CiphertextInvalid)


def test_what_does_not_fit_is_not_asked_for_and_a_smaller_one_after_it_is() -> None:
    found = survey(
        source_file("a", size_bytes=5 * 4096),
        source_file("b", size_bytes=6 * 4096),
        source_file("c", size_bytes=4096),
        source_file("unknown", size_bytes=10**9, exact=False),
    )
    decided = ram_plan.plan(found, {}, {}, CACHE, NOW)
    assert [file.path for file in decided.ask] == ["a", "c", "unknown"]
    assert isinstance(decided.known["b"], RamLimitReached)


def test_a_file_that_failed_is_asked_for_again_later_and_later() -> None:
    file = source_file("a")
    trouble: Trouble | None = None
    delays = []
    for _ in range(10):
        trouble = Trouble.after(trouble, file, DENIED, NOW)
        delays.append(trouble.delay_s)
    assert delays[:4] == [1, 2, 4, 8]
    assert delays[-1] == 60
    assert trouble is not None
    again = ram_plan.plan(survey(file), {}, {"a": trouble}, CACHE, NOW + 59)
    assert (again.ask, again.known) == ((), {"a": DENIED})
    assert ram_plan.plan(survey(file), {}, {"a": trouble}, CACHE, NOW + 60).ask == (file,)
    changed = source_file("a", 2)
    assert ram_plan.plan(survey(changed), {}, {"a": trouble}, CACHE, NOW).ask == (changed,)
    assert Trouble.after(trouble, changed, DENIED, NOW).delay_s == 1


def test_while_kms_is_away_a_file_is_asked_for_every_few_seconds() -> None:
    file = source_file("a")
    not_asked = KmsUnreachable("not asked")
    not_asked.again_in_s = 0.5
    trouble: Trouble | None = None
    delays = []
    nonsense = KmsAnswerInvalid("a captive portal")
    for error in (not_asked, not_asked, AWAY, not_asked, AWAY, nonsense, DENIED, not_asked):
        trouble = Trouble.after(trouble, file, error, NOW)
        delays.append(trouble.delay_s)
    assert delays == [1, 1, 2, 2, 2, 2, 4, 2]


def test_a_file_that_its_workers_are_lost_to_is_asked_for_less_and_less_often() -> None:
    trouble: Trouble | None = None
    delays = []
    for _ in range(8):
        trouble = Trouble.after(trouble, source_file("a"), WorkerFailed("lost"), NOW)
        delays.append(trouble.delay_s)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("error", [CiphertextInvalid("bad"), FileTooLarge("large")])
def test_bytes_that_can_never_be_shown_are_not_asked_for_again(error: KmsfsError) -> None:
    assert Trouble.after(None, source_file("a"), error, NOW).again_at_s == math.inf


def test_files_that_are_wanted_again_are_asked_for_whatever_is_known() -> None:
    names = ("kept", "sub/failed", "sub/kept", "subway")
    files = [source_file(name) for name in names]
    trouble = Trouble.after(None, files[1], CiphertextInvalid("cut"), NOW)
    shown = {name: ram_file(name) for name in names if name != "sub/failed"}

    def asked(again: str | None) -> list[str]:
        troubles = {"sub/failed": trouble}
        decided = ram_plan.plan(survey(*files), shown, troubles, CACHE, NOW, again=again)
        return [file.path for file in decided.ask]

    assert asked(None) == []
    assert asked("sub") == ["sub/failed", "sub/kept"]
    assert asked("kept") == ["kept"]
    assert asked("") == list(names)


def test_a_refused_file_goes_and_the_others_stay() -> None:
    shown = {"a": ram_file("a", at=NOW - 100), "b": ram_file("b")}
    following = settled([source_file("a"), source_file("b")], shown, {"a": DENIED})
    assert following.files == {"b": shown["b"]}
    assert (following.failed, following.stale) == ({"a": DENIED}, {})


@pytest.mark.parametrize(
    "error",
    [
        AWAY,
        CredentialsUnavailable("expired"),
        KmsAnswerInvalid("a captive portal"),
        WorkerFailed("lost"),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.parametrize(("age_s", "kept"), [(100, True), (149, True), (150, False), (200, False)])
def test_without_a_verdict_of_kms_an_expired_file_stays_for_the_stale_time(
    error: KmsfsError, age_s: float, kept: bool
) -> None:
    shown = {"a": ram_file("a", at=NOW - age_s)}
    following = settled([source_file("a")], shown, {"a": error})
    assert following.files == (shown if kept else {})
    assert following.stale == ({"a": error} if kept else {})
    assert following.failed == ({} if kept else {"a": error})


def test_without_kms_for_one_changed_file_no_changed_file_is_shown() -> None:
    shown = {"cert": ram_file("cert"), "key": ram_file("key"), "gone": ram_file("gone")}
    files = [source_file("cert", 2), source_file("key", 2), source_file("new")]
    outcomes: dict[str, Outcome] = {
        "cert": ram_file("cert", 2),
        "key": AWAY,
        "new": ram_file("new"),
    }
    following = settled(files, shown, outcomes)
    assert following.files == {
        "cert": shown["cert"],
        "key": shown["key"],
        "new": outcomes["new"],
    }
    assert following.fresh == {"new"}
    assert following.stale == {"cert": AWAY, "key": AWAY}
    assert following.held_back == {"cert", "key"}


def test_a_file_that_waits_for_another_goes_when_its_time_is_over_and_waits_on() -> None:
    files = [source_file("cert", 2), source_file("key", 2)]
    shown = {"cert": ram_file("cert", at=NOW - 160), "key": ram_file("key")}
    outcomes: dict[str, Outcome] = {"cert": ram_file("cert", 2), "key": AWAY}
    following = settled(files, shown, outcomes)
    assert following.files == {"key": shown["key"]}
    assert (following.failed, following.held_back) == ({"cert": AWAY}, {"cert", "key"})
    decided = ram_plan.plan(survey(*files), following.files, {}, CACHE, NOW)
    later = ram_plan.settle(
        survey(*files), decided, outcomes, following.files, following.held_back,
        cache=CACHE, now=NOW,
    )  # fmt: skip
    assert later.files == {"key": shown["key"]}
    back: dict[str, Outcome] = {"cert": ram_file("cert", 2), "key": ram_file("key", 2)}
    last = ram_plan.settle(
        survey(*files), decided, back, following.files, following.held_back, cache=CACHE, now=NOW
    )
    assert (last.files, last.fresh, last.held_back) == (back, {"cert", "key"}, frozenset())


def test_a_refusal_does_not_hold_the_others_back() -> None:
    shown = {"cert": ram_file("cert"), "key": ram_file("key")}
    outcomes: dict[str, Outcome] = {"cert": ram_file("cert", 2), "key": DENIED}
    following = settled([source_file("cert", 2), source_file("key", 2)], shown, outcomes)
    assert following.files == {"cert": outcomes["cert"]}


def test_a_version_newer_than_the_survey_counts_as_changed() -> None:
    shown = {"a": ram_file("a", at=NOW - 100)}
    following = settled([source_file("a")], shown, {"a": ram_file("a", 7)})
    assert following.fresh == {"a"}


def test_files_of_a_directory_that_cannot_be_listed_stay() -> None:
    shown = {"db/a": ram_file("db/a"), "dbx": ram_file("dbx"), "c": ram_file("c")}
    decided = ram_plan.plan(survey(unreadable=("db",)), shown, {}, CACHE, NOW)
    assert decided.keep == {"db/a": shown["db/a"]}
    everything = ram_plan.plan(survey(unreadable=("",)), shown, {}, CACHE, NOW)
    assert everything.keep == shown


def test_the_next_moment_is_the_first_expiry_retry_or_end() -> None:
    files = {"a": ram_file("a"), "b": ram_file("b", at=NOW - 30)}
    assert ram_plan.next_due_s(files, {}, CACHE) == NOW + 70
    trouble = {"b": Trouble((1, 2, 3, 4, 1), AWAY, NOW + 5, 4)}
    assert ram_plan.next_due_s(files, trouble, CACHE) == NOW + 5
    assert ram_plan.next_due_s(files, {}, CacheSettings(ttl_s=0.0)) == math.inf
    assert ram_plan.next_due_s({}, {}, CACHE) == math.inf


PATHS = st.sampled_from(["a", "b", "d/c", "d/e"])
AGES = st.floats(0, 300)
ERRORS = st.sampled_from([AWAY, DENIED, CiphertextInvalid("bad")])


@given(
    files=st.dictionaries(PATHS, st.integers(1, 3)),
    shown=st.dictionaries(PATHS, st.tuples(st.integers(1, 3), AGES)),
    errors=st.dictionaries(PATHS, ERRORS),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_the_next_set_holds_the_rules(
    files: dict[str, int],
    shown: dict[str, tuple[int, float]],
    errors: dict[str, KmsfsError],
    data: st.DataObject,
) -> None:
    found = survey(*(source_file(path, version) for path, version in sorted(files.items())))
    was = {p: ram_file(p, version, at=NOW - age) for p, (version, age) in shown.items()}
    decided = ram_plan.plan(found, was, {}, CACHE, NOW)
    outcomes: dict[str, Outcome] = {
        f.path: errors.get(f.path) or ram_file(f.path, f.version[4]) for f in decided.ask
    }
    following = ram_plan.settle(found, decided, outcomes, was, cache=CACHE, now=NOW)
    # What is not in the source is not shown, and nothing is both shown and failed.
    assert following.files.keys() <= files.keys()
    assert following.files.keys() | following.failed.keys() == files.keys()
    assert not following.files.keys() & following.failed.keys()
    assert following.fresh <= following.files.keys()
    assert sum(round_to_pages(f.size_bytes) for f in following.files.values()) <= CACHE.max_bytes
    changed = {path for path in following.files if path in was and files[path] != shown[path][0]}
    moved = changed & following.fresh
    for path, file in following.files.items():
        if path in following.fresh:
            assert file.version[4] == files[path]
            assert path not in errors
        else:
            # Linked: it was there, in that version, and is not past its last moment.
            assert was[path].version == file.version
            assert NOW - was[path].decrypted_at_s < 150 or file.decrypted_at_s == NOW
        assert not isinstance(errors.get(path), KeyAccessDenied) or path in decided.keep
    # Changed files move together or not at all while KMS is away for one of them.
    away = {
        path
        for path, outcome in outcomes.items()
        if outcome is AWAY and path in was and files[path] != shown[path][0]
    }
    assert not (moved and away)
