"""Errors: every leaf has its three answers and survives the trip between processes."""

import errno

import pytest

from kmsfs import error_codes, errors
from kmsfs.error_codes import from_code
from kmsfs.errors import ExitCode, KmsfsError, WorkerBug

LEAVES = sorted(error_codes._leaves(KmsfsError).items())


@pytest.mark.parametrize(("code", "leaf"), LEAVES)
def test_every_error_comes_back_as_itself(code: str, leaf: type[KmsfsError]) -> None:
    sent = leaf("what happened")
    received = from_code(sent.code, sent.detail)
    assert type(received) is leaf
    assert (received.detail, received.hint, str(received)) == (
        "what happened",
        leaf.hint,
        "what happened",
    )
    assert sent.code == code


@pytest.mark.parametrize(("code", "leaf"), LEAVES)
def test_every_error_has_a_real_errno_and_an_exit_code(code: str, leaf: type[KmsfsError]) -> None:
    assert leaf.errno in errno.errorcode
    assert isinstance(leaf.exit_code, ExitCode)
    assert leaf.exit_code is not ExitCode.DONE
    assert leaf.__doc__, code


def test_a_raisers_hint_replaces_the_classs_own_and_travels() -> None:
    error = errors.KeyUnusable("disabled", hint="ask Bob")
    assert error.hint == "ask Bob"
    assert from_code(error.code, error.detail, error.hint).hint == "ask Bob"
    assert errors.KeyUnusable("disabled").hint == errors.KeyUnusable.hint


@pytest.mark.parametrize("code", ["", "KmsfsError", "SystemExit", "os.system", "Nothing"])
def test_a_code_nobody_knows_is_a_workers_bug(code: str) -> None:
    error = from_code(code, "detail")
    assert type(error) is WorkerBug
    assert error.detail == f"{code}: detail"


@pytest.mark.parametrize(
    ("leaf", "name"),
    [
        (errors.PolicyDenied, "EACCES"),
        (errors.KeyAccessDenied, "EKEYREJECTED"),
        (errors.KeyNotAllowed, "EKEYREJECTED"),
        (errors.IncorrectKey, "EKEYREJECTED"),
        (errors.KeyUnusable, "EKEYREVOKED"),
        (errors.VolumeLocked, "ENOKEY"),
        (errors.CiphertextInvalid, "EBADMSG"),
        (errors.ContextMismatch, "EBADMSG"),
        (errors.NotBound, "EBADMSG"),
        (errors.CiphertextChanging, "EBADMSG"),
        (errors.CredentialsUnavailable, "EKEYEXPIRED"),
        (errors.KmsUnreachable, "ETIMEDOUT"),
        (errors.KmsThrottled, "ETIMEDOUT"),
        (errors.DeadlineExceeded, "ETIMEDOUT"),
        (errors.TooManyWaiting, "ETIMEDOUT"),
        (errors.NameConflict, "ENOTUNIQ"),
        (errors.FileTooLarge, "EFBIG"),
        (errors.LockedMemoryExhausted, "ENOMEM"),
        (errors.WorkerFailed, "EIO"),
        (errors.KmsAnswerInvalid, "EIO"),
    ],
)
def test_what_programs_see_is_what_the_manual_says(leaf: type[KmsfsError], name: str) -> None:
    assert leaf.errno == getattr(errno, name)
