"""The policies that a volume's keys and roles need, read from its tree. AWS is not asked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kmsfs.errors import InputUnreadable, KmsfsError, UsageInvalid
from kmsfs.formats.detect import Format
from kmsfs.manage.inspect import inspect_file
from kmsfs.manage.key_policy import (
    Policy,
    Principals,
    iam_policies,
    key_name,
    key_policy,
    volume_pairs,
)
from kmsfs.manage.place import VolumeHere, volume_above
from kmsfs.store.source import Source


@dataclass(frozen=True, slots=True)
class VolumePolicies:
    """What `kmsfs key policy` shows.

    Attributes:
        keys: key ARN to key policy.
        iam: see `iam_policies`.
        outside: source paths of files that readers could not decrypt under these policies: their
            encryption context is not the volume's.
    """

    volume: str
    keys: dict[str, Policy]
    iam: dict[str, Policy]
    outside: tuple[str, ...]


def volume_policies(directory: Path, principals: Principals) -> VolumePolicies:
    """The policies for the volume that a directory belongs to.

    Args:
        principals: without readers, the volume's own `role_arn` is one, if it has one.

    Raises:
        UsageInvalid: no volume, or one without keys, or with keys that are not ARNs; see
            `Principals.check` and `volume_pairs`.
        InputUnreadable, ConfigInvalid, ConfigUntrusted: see their classes.
    """
    if not directory.is_dir():
        raise InputUnreadable(f"{directory} is not a directory")
    volume = volume_above(directory)
    if volume is None:
        raise UsageInvalid(
            f"no kmsfs.toml lies in or above {directory}", hint="make a volume with `kmsfs init`"
        )
    table = volume.file.kms
    if not principals.readers and table.role_arn is not None:
        principals = replace(principals, readers=(table.role_arn,))
    principals.check()
    if not table.key_ids:
        raise UsageInvalid(
            f"volume {volume.name!r} has no key", hint="name one under key_ids in kmsfs.toml"
        )
    keys = [key_name(key_id) for key_id in table.key_ids]
    pairs = volume_pairs(volume.name, table.encryption_context)
    return VolumePolicies(
        volume=volume.name,
        keys={
            key.arn: key_policy(key.account, principals, pairs, multi_region=key.multi_region)
            for key in keys
        },
        iam=iam_policies(keys, pairs),
        outside=tuple(_outside(volume, pairs)),
    )


def _outside(volume: VolumeHere, pairs: Mapping[str, str]) -> list[str]:
    source = Source(str(volume.root))
    try:
        files = source.survey().files
    finally:
        source.close()
    return [
        file.source_path
        for file in files
        if not pairs.items() <= _context(volume, file.source_path).items()
    ]


def _context(volume: VolumeHere, source_path: str) -> Mapping[str, str]:
    """The encryption context that KMS is asked with for a file."""
    try:
        found = inspect_file(os.path.join(volume.root, source_path))
    except KmsfsError:
        return {}
    if found.format is Format.ESDK:
        return found.encryption_context
    return volume.file.kms.encryption_context
