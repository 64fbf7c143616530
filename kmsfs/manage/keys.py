"""Which keys a command asks, and how: the volume's configuration under the command's options."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from kmsfs.config import KmsTable
from kmsfs.errors import KmsfsError, UsageInvalid
from kmsfs.keys import loggers
from kmsfs.keys.service import DecryptProbe, KeyService
from kmsfs.manage.gate import Gate, GatedKeys
from kmsfs.manage.input import check_utf8
from kmsfs.manage.place import VolumeHere, volume_above
from kmsfs.settings import KmsSettings

# A person waits for a command; a reader of a mount gets less.
COMMAND_DEADLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """What the command line says of keys; None and empty where it says nothing."""

    key_ids: tuple[str, ...] = ()
    any_key: bool = False
    encryption_context: dict[str, str] = field(default_factory=dict)
    profile: str | None = None
    region: str | None = None
    endpoint_url: str | None = None


def settings_for(volume: VolumeHere | None, options: KeyOptions) -> KmsSettings:
    """A volume's key settings, in which each option given replaces the volume's value.

    Any key means any: the volume's key ids do not hold then, and an Encryption SDK message is
    decrypted under the key it names.

    Raises:
        UsageInvalid: any key, and certain ones; a value that is not UTF-8.
    """
    if options.any_key and options.key_ids:
        raise UsageInvalid("--any-key and --key-id contradict each other")
    for text in (
        *options.key_ids,
        *options.encryption_context,
        *options.encryption_context.values(),
        *(options.profile or "", options.region or "", options.endpoint_url or ""),
    ):
        check_utf8(text, "value")
    table = volume.file.kms if volume is not None else KmsTable()
    return KmsSettings(
        key_ids=() if options.any_key else options.key_ids or table.key_ids,
        any_key=options.any_key,
        encryption_context=options.encryption_context or table.encryption_context,
        profile=options.profile or table.profile,
        role_arn=table.role_arn,
        region=options.region or table.region,
        endpoint_url=options.endpoint_url or table.endpoint_url,
        deadline_s=max(table.deadline_s, COMMAND_DEADLINE_S),
        allow_non_committing=table.allow_non_committing,
    )


# By settings: made before fork, for the first user in each process.
_prepared: dict[bytes, KeyService] = {}


def key_service(settings: KmsSettings) -> KeyService:
    """KMS under these settings. Nothing is asked of it yet.

    Raises:
        CredentialsUnavailable: the profile does not exist.
    """
    # boto3 is imported here: commands that fail earlier do not wait for it.
    from kmsfs.keys.aws import AwsKeyService

    loggers.silence()
    return _prepared.pop(_identity(settings), None) or AwsKeyService(settings)


def decrypt_probe(settings: KmsSettings) -> DecryptProbe:
    """As `key_service`, for finding out what KMS would decrypt."""
    from kmsfs.keys.aws import AwsKeyService

    loggers.silence()
    return AwsKeyService(settings)


def prepare_for_fork(paths: Sequence[Path], options: KeyOptions) -> None:
    """Do once what every forked process would do by itself: import, read, find credentials.

    No connection is opened to KMS. What fails is left to those who work on the files.

    Args:
        paths: of the ciphertext; what is prepared is for the volume of the first.
    """
    from kmsfs.keys.aws import AwsKeyService, warm_up

    loggers.silence()
    if not paths:
        return
    with contextlib.suppress(KmsfsError):
        settings = settings_for(volume_above(paths[0].parent), options)
        warm_up(settings)
        keys = AwsKeyService(settings)
        keys.find_credentials(settings.key_ids)
        _prepared[_identity(settings)] = keys


class KeyServices:
    """One key service for each distinct settings, for commands that work on several volumes.

    Args:
        gate: how many processes may ask at once; None for a process that is alone.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate
        self._services: dict[bytes, KeyService] = {}

    def get(self, settings: KmsSettings) -> KeyService:
        """The key service for these settings, made when first asked for."""
        identity = _identity(settings)
        if identity not in self._services:
            keys = key_service(settings)
            self._services[identity] = keys if self._gate is None else GatedKeys(keys, self._gate)
        return self._services[identity]


def _identity(settings: KmsSettings) -> bytes:
    return msgspec.json.encode(settings, order="deterministic")
