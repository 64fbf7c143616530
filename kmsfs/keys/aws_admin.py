"""Making keys through botocore: for commands of an administrator, never for mounts."""

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from botocore.config import Config

from kmsfs.errors import (
    CredentialsUnavailable,
    KeyAccessDenied,
    KeyNotFound,
    KmsAnswerInvalid,
    KmsThrottled,
    KmsUnreachable,
    RegionUnknown,
)
from kmsfs.keys import aws_errors, deadline
from kmsfs.keys.aws_session import AwsSession
from kmsfs.settings import KmsSettings

# CreateKey makes another key each time: it is asked once, and for longer.
_ONCE: Final = Config(retries={"mode": "standard", "total_max_attempts": 1}, read_timeout=15)

# KMS is eventually consistent: a key that was just made may not be seen for some seconds.
_SEEN_WITHIN_S: Final = 10.0
_SEEN_POLL_S: Final = 0.25

R = TypeVar("R")


class AwsKeyAdmin:
    """Makes one key with its alias.

    Every call ends within `settings.deadline_s`; its errors are those of `AwsKeyService`, and
    what the methods say.

    Args:
        alias: begins with `alias/`; also names the key where it is not there yet.
    """

    def __init__(self, settings: KmsSettings, alias: str) -> None:
        self._settings = settings
        self._alias = alias
        self._session = AwsSession(settings)

    def caller_arn(self) -> str:
        """The ARN of the current identity: its account is that of the keys it makes."""

        def ask(region: str) -> Any:
            client: Any = self._session.new_client("sts", region)
            return client.get_caller_identity()

        try:
            # A refusal here is one of the credentials, and told as such.
            arn = self._ask("CreateKey", ask).get("Arn")
        except (CredentialsUnavailable, KmsUnreachable) as error:
            if self._settings.endpoint_url is not None:
                error.hint = (
                    "STS is asked for the account: name its address in AWS_ENDPOINT_URL_STS"
                )
            raise
        if not isinstance(arn, str) or len(arn.split(":")) < 6:
            raise KmsAnswerInvalid("GetCallerIdentity: the answer has no ARN")
        return arn

    def alias_exists(self) -> bool:
        """Whether the alias stands for a key already.

        Raises:
            KeyAccessDenied: it does, for a key that this identity may not look at.
        """
        try:
            self._ask(
                "DescribeKey", lambda region: self._kms(region).describe_key(KeyId=self._alias)
            )
        except KeyNotFound:
            return False
        return True

    def create_key(self, *, policy: str, description: str, multi_region: bool) -> str:
        """Make a key and return its ARN. After a failure to reach KMS it may be there.

        Raises:
            KeyPolicyRefused: KMS does not take the policy.
        """

        def ask(region: str) -> Any:
            client: Any = self._session.new_client("kms", region, _ONCE)
            return client.create_key(
                Policy=policy, Description=description, MultiRegion=multi_region
            )

        metadata = self._ask("CreateKey", ask).get("KeyMetadata")
        arn = metadata.get("Arn") if isinstance(metadata, dict) else None
        if not isinstance(arn, str):
            raise KmsAnswerInvalid("CreateKey: the answer has no ARN")
        return arn

    def enable_rotation(self, key_arn: str) -> None:
        """Have KMS renew a key's material each year."""
        self._ask_when_seen(
            "EnableKeyRotation",
            lambda region: self._kms(region).enable_key_rotation(KeyId=key_arn),
        )

    def create_alias(self, key_arn: str) -> None:
        """Let the alias stand for a key.

        Raises:
            OutputExists: it stands for another.
        """
        self._ask_when_seen(
            "CreateAlias",
            lambda region: self._kms(region).create_alias(
                AliasName=self._alias, TargetKeyId=key_arn
            ),
        )

    def _kms(self, region: str) -> Any:
        return self._session.client(region)

    def _ask_when_seen(self, operation: str, ask: Callable[[str], R]) -> R:
        ends_at = time.monotonic() + _SEEN_WITHIN_S
        while True:
            try:
                return self._ask(operation, ask)
            except KeyNotFound:
                if time.monotonic() >= ends_at:
                    raise
            time.sleep(_SEEN_POLL_S)

    def _ask(self, operation: str, ask: Callable[[str], R]) -> R:
        try:
            with (
                deadline.limit(self._settings.deadline_s),
                aws_errors.translating(operation, self._alias),
            ):
                region = self._session.region
                if region is None:
                    raise RegionUnknown(
                        f"no region is known for {self._alias}", hint="name one with --region"
                    )
                return ask(region)
        except KeyAccessDenied as error:
            error.hint = f"give this identity kms:{operation}"
            raise
        except KmsThrottled as error:
            if "LimitExceeded" in error.detail:
                error.hint = "a quota of this account is used up: see Service Quotas, AWS KMS"
            raise
