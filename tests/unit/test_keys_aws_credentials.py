"""Where credentials come from, what is wrong with them, and how new ones are found."""

import json
import os
import subprocess
import sys

import botocore.utils
import pytest

from kmsfs.errors import ConfigInvalid, CredentialsUnavailable, KmsThrottled
from kmsfs.keys import aws, aws_session
from kmsfs.keys.aws import AwsKeyService
from kmsfs.settings import KmsSettings
from tests.support.aws_files import AwsFiles
from tests.support.canary import MARK, carries
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.strict_keys import KmsKey
from tests.support.strict_kms import Identity, StrictKms


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_session, "ATTEMPTS", 1)


@pytest.fixture(autouse=True)
def _endpoint(aws_files: AwsFiles, strict_kms: StrictKms) -> None:
    """The stand-in is known, credentials are not."""
    aws_files.set_environment(
        strict_kms.env(), without=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )


def service(**settings: str) -> AwsKeyService:
    return AwsKeyService(KmsSettings(**settings))  # type: ignore[arg-type]


def as_environment(aws_files: AwsFiles, identity: Identity) -> None:
    aws_files.monkeypatch.setenv("AWS_ACCESS_KEY_ID", identity.access_key_id)
    aws_files.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", identity.secret_access_key)
    if identity.session_token is not None:
        aws_files.monkeypatch.setenv("AWS_SESSION_TOKEN", identity.session_token)


def process_output(identity: Identity) -> str:
    return json.dumps(
        {
            "Version": 1,
            "AccessKeyId": identity.access_key_id,
            "SecretAccessKey": identity.secret_access_key,
        }
    )


# --- sources -----------------------------------------------------------------------------------


def test_environment(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    as_environment(aws_files, strict_kms.admin)
    keys = service()
    assert keys.credential_source is None
    keys.resolve_key_arn(kms_key.arn)
    assert keys.credential_source == "environment"
    assert aws.credential_source(KmsSettings()) == "environment"


def test_profile_comes_before_the_environment(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    other = strict_kms.create_identity("other")
    as_environment(aws_files, other)
    aws_files.write_credentials("web", strict_kms.admin)
    keys = service(profile="web")
    keys.resolve_key_arn(kms_key.arn)
    assert keys.credential_source == "shared-credentials-file"
    assert strict_kms.calls()[-1].access_key_id == strict_kms.admin.access_key_id
    assert aws.credential_source(KmsSettings(profile="web")) is None


def test_profile_of_the_environment(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.write_credentials("web", strict_kms.admin)
    aws_files.monkeypatch.setenv("AWS_PROFILE", "web")
    assert service().resolve_key_arn(kms_key.arn) == kms_key.arn


def test_region_and_endpoint_of_the_profile(aws_files: AwsFiles, strict_kms: StrictKms) -> None:
    key = strict_kms.create_key(region="eu-west-3", alias="alias/west")
    aws_files.monkeypatch.delenv("AWS_DEFAULT_REGION")
    aws_files.monkeypatch.delenv("AWS_ENDPOINT_URL")
    aws_files.write_credentials("web", strict_kms.admin)
    aws_files.write_profile("web", region="eu-west-3", endpoint_url=strict_kms.endpoint_url)
    assert service(profile="web").resolve_key_arn("alias/west") == key.arn


def test_credential_process(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    program = aws_files.program(f"print({process_output(strict_kms.admin)!r})")
    aws_files.write_process("web", *program)
    keys = service(profile="web")
    keys.resolve_key_arn(kms_key.arn)
    assert keys.credential_source == "custom-process"


def test_role_is_taken_on_once_and_used(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms.admin)
    role = strict_kms.create_role("reader", strict_kms.admin)
    strict_kms.deny(strict_kms.admin, "*")
    keys = service(role_arn=role)
    for _ in range(3):
        keys.resolve_key_arn(kms_key.arn)
    assert [call.operation for call in strict_kms.calls()] == ["AssumeRole"] + 3 * ["DescribeKey"]
    assert keys.credential_source == "assume-role"
    assert aws.credential_source(KmsSettings(role_arn=role)) == "assume-role"


def test_role_is_taken_on_anew_before_it_ends(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms.admin)
    role = strict_kms.create_role("reader", strict_kms.admin)
    strict_kms.role_lifetime_s = 60
    keys = service(role_arn=role)
    keys.resolve_key_arn(kms_key.arn)
    keys.resolve_key_arn(kms_key.arn)
    assert len(strict_kms.calls("AssumeRole")) == 2


def test_role_is_asked_for_in_the_region_of_the_key(
    aws_files: AwsFiles, strict_kms: StrictKms
) -> None:
    key = strict_kms.create_key(region="eu-west-3")
    aws_files.monkeypatch.delenv("AWS_DEFAULT_REGION")
    as_environment(aws_files, strict_kms.admin)
    role = strict_kms.create_role("reader", strict_kms.admin)
    service(role_arn=role).resolve_key_arn(key.arn)
    assert strict_kms.calls("AssumeRole")[0].region == "eu-west-3"


def test_container_credentials(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    aws_files.monkeypatch.setenv(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{strict_kms.endpoint_url}/credentials"
    )
    keys = service()
    keys.resolve_key_arn(kms_key.arn)
    assert keys.credential_source == "container-role"


# --- found later -------------------------------------------------------------------------------


def test_credentials_that_appear_later_are_found(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    keys = service()
    with pytest.raises(CredentialsUnavailable, match="no AWS credentials"):
        keys.resolve_key_arn(kms_key.arn)
    aws_files.write_credentials("default", strict_kms.admin)
    assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn


def test_credentials_that_were_replaced_are_found_within_the_call(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    first, second = strict_kms.create_identity("first"), strict_kms.create_identity("second")
    aws_files.write_credentials("default", first)
    keys = service()
    keys.resolve_key_arn(kms_key.arn)
    aws_files.write_credentials("default", second)
    first.expired = True
    assert keys.resolve_key_arn(kms_key.arn) == kms_key.arn
    assert [call.error for call in strict_kms.calls()] == [None, "ExpiredTokenException", None]


def test_expired_credentials_that_nobody_replaced_are_tried_once_more_only(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.write_credentials("default", strict_kms.admin)
    keys = service()
    keys.resolve_key_arn(kms_key.arn)
    strict_kms.admin.expired = True
    strict_kms.forget_calls()
    with pytest.raises(CredentialsUnavailable, match="ExpiredTokenException"):
        keys.resolve_key_arn(kms_key.arn)
    assert len(strict_kms.calls()) == 2
    with pytest.raises(CredentialsUnavailable):
        keys.resolve_key_arn(kms_key.arn)
    assert len(strict_kms.calls()) == 3


# --- unusable ----------------------------------------------------------------------------------


def test_unknown_access_key(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    gone = strict_kms.create_identity("gone")
    strict_kms.remove_identity(gone)
    as_environment(aws_files, gone)
    with pytest.raises(CredentialsUnavailable, match="UnrecognizedClientException"):
        service().resolve_key_arn(kms_key.arn)


def test_wrong_secret(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    as_environment(aws_files, strict_kms.admin)
    aws_files.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CredentialsUnavailable, match="InvalidSignatureException"):
        service().resolve_key_arn(kms_key.arn)


def test_wrong_session_token(aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey) -> None:
    as_environment(aws_files, strict_kms.admin)
    aws_files.monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
    with pytest.raises(CredentialsUnavailable):
        service().resolve_key_arn(kms_key.arn)


def test_half_of_the_environment(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.monkeypatch.setenv("AWS_ACCESS_KEY_ID", strict_kms.admin.access_key_id)
    with pytest.raises(CredentialsUnavailable, match="AWS_SECRET_ACCESS_KEY"):
        service().resolve_key_arn(kms_key.arn)


def test_missing_profile_is_named(kms_key: KmsKey) -> None:
    with pytest.raises(CredentialsUnavailable, match="'missing'"):
        service(profile="missing").resolve_key_arn(kms_key.arn)


def test_configuration_file_that_is_none(aws_files: AwsFiles, kms_key: KmsKey) -> None:
    aws_files.config.write_text("no section\n")
    with pytest.raises(ConfigInvalid, match=aws_files.config.name):
        service().resolve_key_arn(kms_key.arn)


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit('no luck')",
        "print('no json')",
        "print('{}')",
        "print('[]')",
        f"print('{MARK}')",
        "print('{\"Version\": 2}')",
    ],
)
def test_credential_process_that_fails(aws_files: AwsFiles, kms_key: KmsKey, text: str) -> None:
    aws_files.write_process("web", *aws_files.program(text))
    with pytest.raises(CredentialsUnavailable) as caught:
        service(profile="web").resolve_key_arn(kms_key.arn)
    assert not carries(caught.value.detail)


def test_credential_process_that_does_not_exist(aws_files: AwsFiles, kms_key: KmsKey) -> None:
    aws_files.write_process("web", "/nonexistent/program")
    with pytest.raises(CredentialsUnavailable):
        service(profile="web").resolve_key_arn(kms_key.arn)


def test_role_that_may_not_be_taken_on(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms.admin)
    role = strict_kms.create_role("reader")
    with pytest.raises(CredentialsUnavailable, match="AssumeRole: AccessDenied"):
        service(role_arn=role).resolve_key_arn(kms_key.arn)


def test_role_without_anything_to_take_it_on_with(strict_kms: StrictKms, kms_key: KmsKey) -> None:
    role = strict_kms.create_role("reader")
    with pytest.raises(CredentialsUnavailable, match="no AWS credentials"):
        service(role_arn=role).resolve_key_arn(kms_key.arn)


def test_throttled_sts_is_throttling(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    as_environment(aws_files, strict_kms.admin)
    role = strict_kms.create_role("reader", strict_kms.admin)
    strict_kms.fail("Throttling", operation="AssumeRole")
    with pytest.raises(KmsThrottled, match="AssumeRole"):
        service(role_arn=role).resolve_key_arn(kms_key.arn)


def test_web_identity_token_that_is_missing(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey
) -> None:
    aws_files.monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token")
    aws_files.monkeypatch.setenv("AWS_ROLE_ARN", strict_kms.create_role("reader"))
    with pytest.raises(CredentialsUnavailable, match="FileNotFoundError"):
        service().resolve_key_arn(kms_key.arn)


def test_single_sign_on_without_a_login(aws_files: AwsFiles, kms_key: KmsKey) -> None:
    aws_files.write_profile(
        "web",
        sso_start_url="https://example.awsapps.com/start",
        sso_region="us-east-1",
        sso_account_id="111122223333",
        sso_role_name="reader",
    )
    with pytest.raises(CredentialsUnavailable, match="SSO"):
        service(profile="web").resolve_key_arn(kms_key.arn)


@pytest.mark.parametrize("fault", [Fault.HTML_200, Fault.EMPTY_200, Fault.LIST_200])
def test_container_endpoint_that_answers_nonsense(
    aws_files: AwsFiles, fault_proxy: FaultProxy, kms_key: KmsKey, fault: Fault
) -> None:
    fault_proxy.inject(fault)
    # Between its three attempts botocore waits a second.
    aws_files.monkeypatch.setattr(botocore.utils.ContainerMetadataFetcher, "SLEEP_TIME", 0)
    aws_files.monkeypatch.setenv(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{fault_proxy.endpoint_url}/credentials"
    )
    with pytest.raises(CredentialsUnavailable):
        service().resolve_key_arn(kms_key.arn)


# --- before fork -------------------------------------------------------------------------------

# In a process of its own: an audit hook cannot be taken back.
_WARM_UP = """
import json, os, sys, threading

seen = []

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(HOME):
        seen.append(str(arguments[0]))
    if event.startswith("socket."):
        seen.append(event)

HOME = os.environ["HOME"]
from kmsfs.settings import (KmsSettings)
from kmsfs.keys import aws

settings = KmsSettings(role_arn=os.environ.get("ROLE"))
sys.addaudithook(watch)
aws.warm_up(settings)
aws.credential_source(settings)
print(json.dumps({"seen": seen, "threads": threading.active_count()}), flush=True)
seen.clear()
if os.fork() == 0:
    keys = aws.AwsKeyService(settings)
    print(json.dumps({"arn": keys.resolve_key_arn(sys.argv[1]), "seen": len(seen) > 0}), flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("with_role", [False, True])
def test_nothing_is_read_or_asked_before_fork_and_everything_after(
    aws_files: AwsFiles, strict_kms: StrictKms, kms_key: KmsKey, *, with_role: bool
) -> None:
    home = aws_files.directory
    aws_files.write_credentials("default", strict_kms.admin)
    aws_files.write_profile("default", region="us-east-1")
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    env["HOME"] = str(home)
    if with_role:
        env["ROLE"] = strict_kms.create_role("reader", strict_kms.admin)
    done = subprocess.run(
        [sys.executable, "-c", _WARM_UP, kms_key.arn],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = (json.loads(line) for line in done.stdout.splitlines())
    assert before == {"seen": [], "threads": 1}
    assert after == {"arn": kms_key.arn, "seen": True}
