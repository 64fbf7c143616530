"""A file must lie where its encryption context says."""

import pytest

from kmsfs.errors import ContextMismatch, NotBound
from kmsfs.formats.binding import (
    Place,
    bound_context,
    bound_version,
    check_pairs,
    check_place,
    is_bound,
)

HERE = Place("web", "nginx/ssl.pem")


def test_what_is_written_fits_where_it_was_written_for() -> None:
    context = bound_context(HERE, 3, {"service": "web"})
    assert context == {
        "service": "web",
        "kmsfs:volume": "web",
        "kmsfs:path": "nginx/ssl.pem",
        "kmsfs:version": "3",
    }
    check_place(context, HERE, required=True)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "elsewhere", [Place("web", "ssl.pem"), Place("mail", "nginx/ssl.pem"), Place(None, HERE.path)]
)
def test_bound_file_fits_nowhere_else(elsewhere: Place, required: bool) -> None:
    with pytest.raises(ContextMismatch):
        check_place(bound_context(HERE, 1, {}), elsewhere, required=required)


@pytest.mark.parametrize(
    "context", [{}, {"kmsfs:path": HERE.path}, {"kmsfs:volume": "web"}, {"kmsfs:version": "1"}]
)
def test_required_binding_needs_volume_and_path(context: dict[str, str]) -> None:
    with pytest.raises(NotBound):
        check_place(context, HERE, required=True)
    check_place(context, HERE, required=False)


def test_own_pairs_prevail_over_given_ones() -> None:
    assert bound_context(HERE, 1, {"kmsfs:path": "x"})["kmsfs:path"] == HERE.path


def test_version_alone_binds_to_nothing() -> None:
    assert not is_bound({"kmsfs:version": "1", "service": "web"})
    assert is_bound({"kmsfs:path": "x"})
    assert is_bound({"kmsfs:volume": "x"})


@pytest.mark.parametrize("context", [{}, {"service": "mail"}, {"Service": "web"}])
def test_missing_pair_is_a_mismatch(context: dict[str, str]) -> None:
    with pytest.raises(ContextMismatch, match="service=web"):
        check_pairs(context, {"service": "web"})


def test_pairs_beyond_the_required_ones_are_welcome() -> None:
    check_pairs({"service": "web", "more": "x"}, {"service": "web"})


@pytest.mark.parametrize(
    ("named", "version"),
    [("1", 1), ("20261124", 20261124), ("007", 7), ("9" * 18, 10**18 - 1)]
    + [("", 0), ("-1", 0), ("1.5", 0), ("²", 0), ("9" * 19, 0)],
)
def test_version_of_a_bound_file_is_a_number_and_anything_else_is_the_oldest(
    named: str, version: int
) -> None:
    assert bound_version({**bound_context(HERE, 1, {}), "kmsfs:version": named}) == version


def test_bound_file_without_a_version_is_the_oldest_and_an_unbound_one_has_none() -> None:
    assert bound_version({"kmsfs:path": HERE.path}) == 0
    assert bound_version({"kmsfs:version": "3"}) is None
    assert bound_version({}) is None
