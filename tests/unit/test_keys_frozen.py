"""Credentials of a process that is confined once it has them: found once, shared, never renewed."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmsfs.decryptor.credential_cache import CredentialCache
from kmsfs.errors import CredentialsUnavailable, DeadlineExceeded, RegionUnknown
from kmsfs.keys import aws_session
from kmsfs.keys.aws import AwsKeyService
from kmsfs.keys.credentials import NEAR_EXPIRY_S, UNDATED_S, FailedSearch, SessionCredentials
from kmsfs.settings import KmsSettings
from tests.support.aws_files import AwsFiles
from tests.support.credential_source import CredentialSource
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import StrictKms


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_session, "ATTEMPTS", 1)


@pytest.fixture(autouse=True)
def _endpoint(aws_files: AwsFiles, strict_kms: StrictKms) -> None:
    """The stand-in is known, credentials are not."""
    aws_files.set_environment(
        strict_kms.env(), without=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )


@pytest.fixture
def store() -> Iterator[CredentialCache]:
    """Empty secret memory."""
    made = CredentialCache.create()
    if made is None:
        pytest.skip("a kernel without memfd_secret")
    yield made
    made.close()


@pytest.fixture
def source(aws_files: AwsFiles, strict_kms: StrictKms, tmp_path: Path) -> CredentialSource:
    """A program that gives the admin's credentials for an hour."""
    made = CredentialSource(tmp_path / "source", strict_kms.admin)
    aws_files.config.write_text(made.profile)
    return made


class Worker:
    """A key service as a worker has it, that confines nothing but remembers being asked to."""

    def __init__(self, store: CredentialCache | None = None, **settings: str) -> None:
        self.confined: list[frozenset[int]] = []
        kms = KmsSettings(**settings)  # type: ignore[arg-type]
        self.keys = AwsKeyService(kms, confine=self.confined.append, store=store)

    def ask(self, key: KmsKey) -> str:
        """One request."""
        self.keys.set_deadline(20)
        self.keys.prepare([key.arn])
        return self.keys.resolve_key_arn(key.arn)


def as_environment(aws_files: AwsFiles, kms: StrictKms) -> None:
    aws_files.monkeypatch.setenv("AWS_ACCESS_KEY_ID", kms.admin.access_key_id)
    aws_files.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", kms.admin.secret_access_key)


# --- confinement ------------------------------------------------------------------------------


def test_it_is_asked_for_once_after_credentials_and_before_kms(
    source: CredentialSource, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    worker = Worker(profile="web")
    worker.keys.prepare([kms_key.arn])
    assert worker.confined == [frozenset({strict_kms.port})]
    assert (source.runs, strict_kms.calls()) == (1, [])
    worker.ask(kms_key)
    worker.ask(kms_key)
    assert len(worker.confined) == 1
    assert worker.keys.credential_source == "custom-process"


def test_it_waits_until_a_region_is_known(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms)
    aws_files.monkeypatch.delenv("AWS_DEFAULT_REGION")
    worker = Worker()
    worker.keys.prepare([])
    with pytest.raises(RegionUnknown):
        worker.keys.resolve_key_arn("alias/test")
    assert worker.confined == []
    worker.keys.resolve_key_arn(kms_key.arn)
    assert len(worker.confined) == 1


def test_it_is_not_asked_for_where_there_are_no_credentials(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    worker = Worker()
    with pytest.raises(CredentialsUnavailable):
        worker.ask(kms_key)
    assert (worker.confined, worker.keys.worn) == ([], False)
    aws_files.write_credentials("default", strict_kms.admin)
    worker.ask(kms_key)
    assert len(worker.confined) == 1


def test_a_source_that_fails_at_first_recovers(
    source: CredentialSource, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    source.give(None)
    worker = Worker(store, profile="web")
    with pytest.raises(CredentialsUnavailable):
        worker.ask(kms_key)
    source.give(strict_kms.admin, seconds=3600)
    worker.ask(kms_key)
    assert len(worker.confined) == 1


def test_a_process_that_could_not_be_confined_is_to_end(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms)

    def fail(_ports: frozenset[int]) -> None:
        raise RuntimeError

    keys = AwsKeyService(KmsSettings(), confine=fail)
    with pytest.raises(RuntimeError):
        keys.prepare([kms_key.arn])
    assert keys.worn
    assert strict_kms.calls() == []


@pytest.mark.parametrize(
    ("endpoint_url", "proxy", "ports"),
    [
        (None, None, {443}),
        ("https://kms.example:8443", None, {8443}),
        ("http://kms.example", None, {80}),
        (None, "http://proxy.example:3128", {443, 3128}),
        (None, "proxy.example:3129", {443, 3129}),
        (None, "https://proxy.example", {443}),
    ],
)
def test_ports_are_those_of_the_endpoint_and_the_proxy(
    aws_files: AwsFiles,
    strict_kms: StrictKms,
    kms_key: KmsKey,
    *,
    endpoint_url: str | None,
    proxy: str | None,
    ports: set[int],
) -> None:
    as_environment(aws_files, strict_kms)
    aws_files.monkeypatch.delenv("AWS_ENDPOINT_URL")
    if proxy is not None:
        aws_files.monkeypatch.setenv("HTTPS_PROXY", proxy)
    settings = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    worker = Worker(**settings)
    worker.keys.prepare([kms_key.arn])
    assert worker.confined == [frozenset(ports)]


def test_a_connection_given_up_leaves_credentials_and_confinement_as_they_are(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey, fault_proxy: FaultProxy
) -> None:
    as_environment(aws_files, strict_kms)
    worker = Worker(endpoint_url=fault_proxy.endpoint_url)
    worker.ask(kms_key)
    fault_proxy.inject(Fault.HANG, times=1)
    worker.keys.set_deadline(0.3)
    with pytest.raises(DeadlineExceeded):
        worker.keys.resolve_key_arn(kms_key.arn)
    fault_proxy.heal()
    assert worker.ask(kms_key) == kms_key.arn
    assert (len(worker.confined), worker.keys.worn) == (1, False)


# --- refusal and end ------------------------------------------------------------------------------


def test_credentials_that_kms_refuses_later_call_for_another_process(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms)
    worker = Worker()
    worker.ask(kms_key)
    assert not worker.keys.worn
    strict_kms.admin.expired = True
    with pytest.raises(CredentialsUnavailable):
        worker.ask(kms_key)
    assert worker.keys.worn
    assert worker.keys.refused_what_was_kept


def test_credentials_that_kms_refuses_at_once_are_an_error(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms)
    strict_kms.admin.expired = True
    worker = Worker()
    with pytest.raises(CredentialsUnavailable):
        worker.ask(kms_key)
    assert worker.keys.worn
    assert not worker.keys.refused_what_was_kept


def test_a_process_whose_credentials_end_soon_answers_and_is_to_end(
    source: CredentialSource, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    source.give(strict_kms.admin, seconds=NEAR_EXPIRY_S / 2)
    worker = Worker(profile="web")
    assert worker.ask(kms_key) == kms_key.arn
    assert worker.keys.worn
    # Not once more, although botocore would renew what ends within 15 minutes.
    assert source.runs == 1


# --- shared -----------------------------------------------------------------------------------


def test_what_one_process_found_the_next_uses(
    source: CredentialSource, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    for _ in range(3):
        Worker(store, profile="web").ask(kms_key)
    assert source.runs == 1
    used = {call.access_key_id for call in strict_kms.calls()}
    assert used == {strict_kms.admin.access_key_id}


def test_a_role_is_taken_on_once_for_all(
    aws_files: AwsFiles, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms)
    role = strict_kms.create_role("reader", strict_kms.admin)
    for _ in range(3):
        worker = Worker(store, role_arn=role)
        worker.ask(kms_key)
        assert worker.keys.credential_source == "assume-role"
    assert [call.operation for call in strict_kms.calls()] == ["AssumeRole"] + 3 * ["DescribeKey"]


def test_a_container_is_asked_once_for_all(
    aws_files: AwsFiles, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    url = f"{strict_kms.endpoint_url}/credentials"
    aws_files.monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
    Worker(store).ask(kms_key)
    aws_files.monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/")
    second = Worker(store)
    second.ask(kms_key)
    assert second.keys.credential_source == "container-role"


@pytest.mark.parametrize(("seconds", "lasts_s"), [(3600, 3600), (None, UNDATED_S)])
def test_what_ends_soon_is_found_anew_and_replaced(
    source: CredentialSource,
    store: CredentialCache,
    kms_key: KmsKey,
    monkeypatch: pytest.MonkeyPatch,
    *,
    strict_kms: StrictKms,
    seconds: float | None,
    lasts_s: float,
) -> None:
    source.give(strict_kms.admin, seconds=seconds)
    Worker(store, profile="web").ask(kms_key)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + lasts_s - NEAR_EXPIRY_S - 5)
    Worker(store, profile="web").ask(kms_key)
    assert source.runs == 1
    monkeypatch.setattr(time, "time", lambda: now + lasts_s - NEAR_EXPIRY_S + 5)
    source.give(strict_kms.admin, seconds=2 * 3600)
    for _ in range(2):
        Worker(store, profile="web").ask(kms_key)
    assert source.runs == 2


def test_what_kms_refuses_is_not_kept(
    source: CredentialSource, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    Worker(store, profile="web").ask(kms_key)
    strict_kms.admin.expired = True
    second = Worker(store, profile="web")
    with pytest.raises(CredentialsUnavailable):
        second.ask(kms_key)
    assert second.keys.refused_what_was_kept
    assert store.read() is None
    strict_kms.admin.expired = False
    Worker(store, profile="web").ask(kms_key)
    assert source.runs == 2


def test_a_search_that_fails_is_told_to_those_who_waited_and_to_nobody_later(
    source: CredentialSource,
    store: CredentialCache,
    kms_key: KmsKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source.give(None)
    began_at = time.monotonic()
    with pytest.raises(CredentialsUnavailable) as first:
        Worker(store, profile="web").ask(kms_key)
    assert isinstance(store.read(), FailedSearch)
    with pytest.raises(CredentialsUnavailable):
        Worker(store, profile="web").ask(kms_key)
    assert source.runs == 2
    # As if it had begun before the search that failed was over.
    with monkeypatch.context() as patch:
        patch.setattr(aws_session.time, "monotonic", lambda: began_at)
        with pytest.raises(CredentialsUnavailable) as waited:
            Worker(store, profile="web").ask(kms_key)
    assert (source.runs, waited.value.detail) == (2, first.value.detail)


def test_credentials_of_files_and_environment_are_not_kept(
    aws_files: AwsFiles, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.write_credentials("default", strict_kms.admin)
    Worker(store).ask(kms_key)
    assert store.read() is None
    as_environment(aws_files, strict_kms)
    Worker(store).ask(kms_key)
    assert store.read() is None


def test_commands_go_on_renewing_theirs(
    source: CredentialSource, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    keys = AwsKeyService(KmsSettings(profile="web"))
    source.give(strict_kms.admin, seconds=300)
    for _ in range(2):
        assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn
    assert source.runs > 2
    assert not keys.worn


def test_what_lies_in_the_store_is_json_of_the_credentials_alone(
    source: CredentialSource, store: CredentialCache, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    Worker(store, profile="web").ask(kms_key)
    kept = store.read()
    assert isinstance(kept, SessionCredentials)
    admin = strict_kms.admin
    assert (kept.access_key, kept.secret_key) == (admin.access_key_id, admin.secret_access_key)
    assert kept.source == "custom-process"
