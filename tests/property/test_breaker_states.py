"""The circuit breaker against a plain model of its rules, over any order of calls and time."""

import contextlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kmsfs.decryptor.breaker import (
    FAILURES_TO_OPEN,
    MAX_PAUSE_S,
    PROBE_S,
    Attempt,
    Breakers,
)
from kmsfs.errors import (
    CiphertextInvalid,
    CredentialsUnavailable,
    DeadlineExceeded,
    KeyAccessDenied,
    KeyNotAllowed,
    KmsfsError,
    KmsThrottled,
    KmsUnreachable,
    WorkerFailed,
)
from tests.support.events import Recorder

KEYS = ("one", "two")
AWAY: tuple[type[KmsfsError], ...] = (
    KmsUnreachable,
    KmsThrottled,
    DeadlineExceeded,
    CredentialsUnavailable,
)
SILENT: tuple[type[BaseException], ...] = (
    CiphertextInvalid,
    WorkerFailed,
    KeyNotAllowed,
    KeyboardInterrupt,
)


@dataclass(eq=False)
class Call:
    """An open on its way."""

    key: str
    stack: contextlib.ExitStack
    attempt: Attempt
    entered_at: float
    probe: bool
    begun_at: float | None = None


@dataclass
class Model:
    """What must be so of one key."""

    failures: int = 0
    error: KmsfsError | None = None
    is_open: bool = False
    earliest: float = 0.0
    answered_at: float = -1.0
    calls: list[Call] = field(default_factory=list)

    @property
    def probe(self) -> Call | None:
        """The only call that may be under way for the sake of finding out."""
        probes = [call for call in self.calls if call.probe]
        assert len(probes) <= 1, "two probes at a time"
        return probes[0] if probes else None


class BreakerMachine(RuleBasedStateMachine):
    """Calls enter, begin and end in any order, for two keys."""

    @initialize(dice=st.sampled_from([0.0, 0.5, 0.999]))
    def begin(self, dice: float) -> None:
        self.now = 100.0
        self.breakers = Breakers(lambda: self.now, Recorder(), dice=lambda: dice)
        self.models = {key: Model() for key in KEYS}

    def all_calls(self) -> list[Call]:
        """Those under way."""
        return [call for model in self.models.values() for call in model.calls]

    @rule(key=st.sampled_from(KEYS))
    def enter(self, key: str) -> None:
        """A program opens a file."""
        model = self.models[key]
        may = not model.is_open or (model.probe is None and self.now >= model.earliest)
        stack = contextlib.ExitStack()
        try:
            attempt = stack.enter_context(self.breakers.attempt(key))
        except KmsfsError as error:
            assert not may
            self.check_told(model, error)
            return
        assert may
        model.calls.append(Call(key, stack, attempt, self.now, probe=model.is_open))

    def check_told(self, model: Model, error: KmsfsError) -> None:
        """An error that comes without KMS having been asked."""
        assert type(error) is type(model.error)
        assert model.error is not None
        assert error.errno == model.error.errno
        assert error.hint == model.error.hint
        assert error.again_in_s is not None
        assert 0 < error.again_in_s <= MAX_PAUSE_S
        assert "is tried again in" in error.detail or "is being tried" in error.detail

    @precondition(lambda self: any(c.begun_at is None for c in self.all_calls()))
    @rule(data=st.data())
    def get_a_turn(self, data: st.DataObject) -> None:
        """A call that waited may ask KMS now, if there is still reason to."""
        call = data.draw(st.sampled_from([c for c in self.all_calls() if c.begun_at is None]))
        model = self.models[call.key]
        may = (
            call.probe or not model.is_open or (model.probe is None and self.now >= model.earliest)
        )
        try:
            ends_at = call.attempt.begin()
        except KmsfsError as error:
            assert not may
            self.check_told(model, error)
            model.calls.remove(call)
            with contextlib.suppress(KmsfsError), call.stack:
                raise
            return
        assert may
        call.probe = call.probe or model.is_open
        call.begun_at = self.now
        assert ends_at == float("inf") or (call.probe and ends_at == self.now + PROBE_S)

    @precondition(lambda self: self.all_calls())
    @rule(data=st.data(), outcome=st.sampled_from(["away", "away", "silent", "no", "yes"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        """A call ends; one that never had its turn by its deadline or by being cancelled."""
        call = data.draw(st.sampled_from(self.all_calls()))
        model = self.models[call.key]
        error: BaseException | None = None
        if call.begun_at is None:
            error = data.draw(st.sampled_from((DeadlineExceeded, KeyboardInterrupt)))("late")
        elif outcome == "away":
            error = data.draw(st.sampled_from(AWAY))("away")
        elif outcome == "silent":
            error = data.draw(st.sampled_from(SILENT))("silent")
        elif outcome == "no":
            error = KeyAccessDenied("no")
        model.calls.remove(call)
        with contextlib.suppress(KmsfsError, KeyboardInterrupt), call.stack:
            if error is not None:
                raise error
        if call.begun_at is None or outcome == "silent":
            return
        if outcome != "away":
            model.is_open, model.failures, model.answered_at = False, 0, self.now
            for other in model.calls:
                other.probe = False
            return
        asked_s, waited_s = self.now - call.begun_at, call.begun_at - call.entered_at
        stale = call.begun_at < model.answered_at
        if stale or (isinstance(error, DeadlineExceeded) and asked_s < waited_s):
            return
        assert isinstance(error, KmsfsError)
        model.failures += 1
        if not model.is_open:
            model.error = error
        if call.probe or (not model.is_open and model.failures >= FAILURES_TO_OPEN):
            model.error = error
            model.is_open = True
            (found,) = (b for b in self.breakers.open_breakers() if b.key == call.key)
            assert 0 <= found.again_in_s <= MAX_PAUSE_S
            model.earliest = self.now + found.again_in_s

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @invariant()
    def what_is_shown_is_what_is_open(self) -> None:
        if not hasattr(self, "models"):
            return
        shown = {found.key: found for found in self.breakers.open_breakers()}
        assert set(shown) == {key for key, model in self.models.items() if model.is_open}
        for key, found in shown.items():
            model = self.models[key]
            assert found.failures == model.failures >= FAILURES_TO_OPEN
            assert found.error is model.error

    @invariant()
    def a_key_that_is_away_is_tried_again_within_a_pause(self) -> None:
        if not hasattr(self, "models"):
            return
        for model in self.models.values():
            if model.is_open and model.probe is None:
                assert model.earliest <= self.now + MAX_PAUSE_S


TestBreakerStates = BreakerMachine.TestCase
TestBreakerStates.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
