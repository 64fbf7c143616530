"""A daemon that died is replaced, unless it dies too often."""

from kmsfs.launcher.restarts import MAX_RESTARTS, WINDOW_S, Restarts


def test_so_many_deaths_within_a_minute_are_followed_by_another_daemon() -> None:
    now = 0.0
    restarts = Restarts(clock=lambda: now)
    assert [restarts.may_follow() for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [
        False
    ]


def test_deaths_of_longer_ago_do_not_count() -> None:
    now = 0.0
    restarts = Restarts(clock=lambda: now)
    for _ in range(50):
        assert restarts.may_follow()
        now += WINDOW_S / MAX_RESTARTS
