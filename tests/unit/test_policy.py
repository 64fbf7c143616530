"""Who may open what, by path."""

import pytest

from kmsfs.settings import Ownership, OwnershipRule
from kmsfs.store.policy import Permissions, Policy

DEFAULTS = Ownership(uid=1, gid=2, mode=0o400, dir_mode=0o555)
RULES = (
    OwnershipRule(match="nginx/special.pem", uid=10),
    OwnershipRule(match="nginx/*", gid=33, mode=0o440),
    OwnershipRule(match="**/*.pub", mode=0o444),
)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("nginx/special.pem", Permissions(10, 2, 0o400)),
        ("nginx/other.pem", Permissions(1, 33, 0o440)),
        ("nginx/deep/other.pem", Permissions(1, 2, 0o400)),
        ("a.pub", Permissions(1, 2, 0o444)),
        ("deep/er/.hidden.pub", Permissions(1, 2, 0o444)),
        ("nginx/a.pub", Permissions(1, 33, 0o440)),
        ("nginx", Permissions(1, 2, 0o400)),
    ],
)
def test_the_first_rule_that_matches_wins_and_leaves_the_rest_as_it_is(
    path: str, wanted: Permissions
) -> None:
    policy = Policy(DEFAULTS, RULES)
    assert policy.of_file(path) == wanted
    assert policy.of_file(path) == wanted


def test_without_rules_every_file_has_the_mounts_own() -> None:
    assert Policy(DEFAULTS, ()).of_file("any/file") == Permissions(1, 2, 0o400)


def test_directories_have_the_mounts_own() -> None:
    assert Policy(DEFAULTS, RULES).of_directory() == Permissions(1, 2, 0o555)


def test_rules_speak_of_paths_in_the_volume_not_in_the_part_that_is_served() -> None:
    policy = Policy(DEFAULTS, RULES, prefix="nginx/")
    assert policy.of_file("other.pem") == Permissions(1, 33, 0o440)
    assert policy.of_file("nginx/other.pem") == Permissions(1, 2, 0o400)
