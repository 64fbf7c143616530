"""Which version of a file counts as older, and for how long an older one is accepted."""

import pytest

from kmsfs.errors import CiphertextChanging, RolledBack
from kmsfs.store.versions import SeenVersions


def see(seen: SeenVersions, path: str, version: int | None) -> None:
    """One decryption of a version, with nothing happening meanwhile."""
    seen.check(path, version, begun_at=seen.highest_of(path))


def test_newer_and_equal_versions_pass_and_older_ones_do_not() -> None:
    seen = SeenVersions()
    for version in (2, 2, 5):
        see(seen, "a", version)
    with pytest.raises(RolledBack, match="version 4, where version 5 was seen before"):
        see(seen, "a", 4)
    see(seen, "a", 5)
    assert seen.known() == {"a": 5}


def test_each_path_has_its_own_highest_version() -> None:
    seen = SeenVersions()
    see(seen, "a", 9)
    see(seen, "b", 1)
    assert seen.known() == {"a": 9, "b": 1}


def test_a_file_that_is_not_bound_has_no_version_and_passes() -> None:
    seen = SeenVersions()
    see(seen, "a", 9)
    see(seen, "a", None)
    assert seen.known() == {"a": 9}


def test_where_older_versions_are_allowed_nothing_is_refused() -> None:
    seen = SeenVersions(allow_older=True)
    see(seen, "a", 9)
    see(seen, "a", 1)
    assert seen.known() == {"a": 9}


def test_one_older_version_is_accepted_and_is_the_highest_from_then_on() -> None:
    seen = SeenVersions()
    for path in ("a", "b"):
        see(seen, path, 9)
    with seen.accepting_older(["a"]):
        see(seen, "a", 3)
        with pytest.raises(RolledBack):
            see(seen, "a", 2)
        with pytest.raises(RolledBack):
            see(seen, "b", 3)
    assert seen.known() == {"a": 3, "b": 9}


def test_a_path_of_which_no_version_came_has_its_highest_one_again() -> None:
    seen = SeenVersions()
    see(seen, "a", 9)
    with seen.accepting_older(["a", "never seen"]):
        pass
    with pytest.raises(RolledBack):
        see(seen, "a", 3)


def test_what_another_process_has_seen_counts() -> None:
    before, seen = SeenVersions(), SeenVersions()
    see(before, "a", 9)
    see(before, "b", 1)
    see(seen, "b", 2)
    seen.restore(before.known())
    assert seen.known() == {"a": 9, "b": 2}


def test_a_version_that_was_replaced_while_it_was_decrypted_is_no_rollback() -> None:
    seen = SeenVersions()
    see(seen, "a", 1)
    begun_at = seen.highest_of("a")
    see(seen, "a", 2)
    with pytest.raises(CiphertextChanging):
        seen.check("a", 1, begun_at=begun_at)
    with pytest.raises(RolledBack):
        see(seen, "a", 1)
    assert seen.known() == {"a": 2}
