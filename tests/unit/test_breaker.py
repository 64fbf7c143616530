"""When a breaker opens, how long it stays so, and what closes it."""

from collections.abc import Callable

import pytest

from kmsfs.decryptor.breaker import (
    FAILURES_TO_OPEN,
    FIRST_PAUSE_S,
    HASTY_PROBES,
    MAX_PAUSE_S,
    PROBE_S,
    Breakers,
    kms_is_away,
)
from kmsfs.errors import (
    CredentialsUnavailable,
    DeadlineExceeded,
    KeyAccessDenied,
    KeyUnusable,
    KmsAnswerInvalid,
    KmsfsError,
    KmsThrottled,
    KmsUnreachable,
)
from kmsfs.events import BreakerClosed, BreakerOpened
from tests.support.events import Recorder

ARN = "arn:aws:kms:us-east-1:111122223333:key/1"
SAME_KEY_ELSEWHERE = "arn:aws:kms:eu-west-1:111122223333:key/1"


class Bench:
    """Breakers on a clock of the test's own, with the longest pauses that there can be."""

    def __init__(self) -> None:
        self.now = 50.0
        self.dice = 0.999
        self.events = Recorder()
        self.breakers = Breakers(lambda: self.now, self.events, dice=lambda: self.dice)

    def call(
        self,
        error: BaseException | None = None,
        *,
        key: str = ARN,
        before: Callable[[], object] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> float:
        """One call that ends so; returns by when it would have had to end.

        Args:
            before: done while it waits for its turn.
            meanwhile: done while it asks KMS.

        Raises:
            KmsfsError: it was not let through.
        """
        ends_at = 0.0
        try:
            with self.breakers.attempt(key) as attempt:
                before()
                ends_at = attempt.begin()
                meanwhile()
                if error is not None:
                    raise error
        except BaseException as caught:
            if caught is not error:
                raise
        return ends_at

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    def open(self, error: KmsfsError | None = None, *, key: str = ARN) -> None:
        """Have a breaker open."""
        for _ in range(FAILURES_TO_OPEN):
            self.call(error or KmsUnreachable("no route", hint="look"), key=key)

    def pause_s(self) -> float:
        """How long until the next probe."""
        (found,) = self.breakers.open_breakers()
        return found.again_in_s


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_opens_after_some_failures_in_a_row_and_says_when_it_tries_again(bench: Bench) -> None:
    for _ in range(FAILURES_TO_OPEN - 1):
        bench.call(KmsUnreachable("no route"))
    assert bench.breakers.open_breakers() == []
    bench.call(KmsThrottled("slow down", hint="wait"))
    with pytest.raises(KmsThrottled) as caught:
        bench.call()
    assert caught.value.detail == (
        "not asked: KMS is tried again in 0.2 s, after 3 failures in a row: slow down"
    )
    assert caught.value.hint == "wait"
    assert caught.value.again_in_s == pytest.approx(FIRST_PAUSE_S, rel=0.01)
    assert bench.events.of(BreakerOpened) == [BreakerOpened(ARN, "KmsThrottled", "slow down")]


@pytest.mark.parametrize(
    "answer", [None, KeyAccessDenied("no"), KeyUnusable("off")], ids=["content", "denied", "off"]
)
def test_an_answer_of_kms_whatever_it_is_ends_a_row_and_closes(
    bench: Bench, answer: KmsfsError | None
) -> None:
    for _ in range(FAILURES_TO_OPEN - 1):
        bench.call(KmsUnreachable("no route"))
    bench.call(answer)
    for _ in range(FAILURES_TO_OPEN - 1):
        bench.call(KmsUnreachable("no route"))
    assert bench.breakers.open_breakers() == []
    bench.call(KmsUnreachable("no route"))
    bench.now += MAX_PAUSE_S
    bench.call(answer)
    assert bench.breakers.open_breakers() == []
    assert bench.events.of(BreakerClosed) == [BreakerClosed(ARN, MAX_PAUSE_S)]


@pytest.mark.parametrize("error", [KeyAccessDenied("no"), KmsAnswerInvalid("?")])
def test_refusals_and_nonsense_never_open_it(bench: Bench, error: KmsfsError) -> None:
    for _ in range(20):
        bench.call(error)
    assert bench.breakers.open_breakers() == []


def test_other_keys_and_the_same_key_elsewhere_are_let_through(bench: Bench) -> None:
    bench.open()
    assert bench.call(key=SAME_KEY_ELSEWHERE) == float("inf")
    assert bench.call(KeyAccessDenied("no"), key="bare") == float("inf")
    assert [found.key for found in bench.breakers.open_breakers()] == [ARN]


def test_missing_credentials_open_it_too_with_their_own_errno(bench: Bench) -> None:
    error = CredentialsUnavailable("none found")
    assert kms_is_away(error)
    bench.open(error)
    with pytest.raises(CredentialsUnavailable, match="none found"):
        bench.call()


def test_one_probe_at_a_time_goes_through_and_no_longer_than_it_may_take(bench: Bench) -> None:
    bench.open()
    bench.now += MAX_PAUSE_S

    def others_fail() -> None:
        with pytest.raises(KmsUnreachable, match="is being tried"):
            bench.call()

    assert bench.call(DeadlineExceeded("late"), meanwhile=others_fail) == bench.now + PROBE_S
    with pytest.raises(DeadlineExceeded, match="is tried again in"):
        bench.call()


def test_pauses_grow_up_to_a_bound_and_are_spread_by_chance(bench: Bench) -> None:
    bench.open()
    pauses = [bench.pause_s()]
    for _ in range(5):
        bench.now += MAX_PAUSE_S
        bench.call(KmsUnreachable("no route"))
        pauses.append(bench.pause_s())
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(MAX_PAUSE_S, rel=0.01)
    bench.dice = 0.25
    bench.now += MAX_PAUSE_S
    bench.call(KmsUnreachable("no route"))
    assert bench.pause_s() == pytest.approx(MAX_PAUSE_S / 4)


def test_after_hasty_probes_that_were_late_one_may_take_as_long_as_any_open(bench: Bench) -> None:
    bench.open()
    for _ in range(2):
        for _ in range(HASTY_PROBES):
            bench.now += MAX_PAUSE_S
            assert bench.call(DeadlineExceeded("late")) == bench.now + PROBE_S
        bench.now += MAX_PAUSE_S
        assert bench.call(DeadlineExceeded("late")) == float("inf")


def test_a_probe_that_was_cancelled_leaves_its_place_to_the_next(bench: Bench) -> None:
    bench.open()
    bench.now += MAX_PAUSE_S
    bench.call(KeyboardInterrupt())
    bench.call()
    assert bench.breakers.open_breakers() == []


def failing_later(bench: Bench, count: int) -> Callable[[], None]:
    """Calls under way, which all fail when the result is called."""
    attempts = [bench.breakers.attempt(ARN) for _ in range(count)]
    for attempt in attempts:
        attempt.__enter__().begin()

    def fail() -> None:
        for attempt in attempts:
            error = DeadlineExceeded("late")
            assert not attempt.__exit__(type(error), error, None)

    return fail


def test_calls_that_began_before_kms_last_answered_are_no_news_when_they_fail(
    bench: Bench,
) -> None:
    fail = failing_later(bench, 2 * FAILURES_TO_OPEN)
    bench.now += 1
    bench.call()
    bench.now += 1
    fail()
    assert bench.breakers.open_breakers() == []


def test_a_deadline_that_went_by_behind_other_calls_says_nothing_of_kms(bench: Bench) -> None:
    for _ in range(10):
        bench.call(
            DeadlineExceeded("late"),
            before=lambda: bench.wait(5),
            meanwhile=lambda: bench.wait(3),
        )
    assert bench.breakers.open_breakers() == []


def test_who_waited_for_a_turn_is_told_that_it_has_opened_meanwhile(bench: Bench) -> None:
    with pytest.raises(KmsUnreachable, match="not asked"):
        bench.call(before=bench.open)
    (found,) = bench.breakers.open_breakers()
    assert found.failures == FAILURES_TO_OPEN


def test_closing_all_forgets_what_was_away(bench: Bench) -> None:
    bench.open()
    bench.breakers.close_all()
    assert bench.call() == float("inf")
