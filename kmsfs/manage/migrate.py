"""`kmsfs migrate`: files that a volume serves unbound become bound Encryption SDK messages.

Each file is replaced by its bound, verified form first; the patterns of `unbound` that no unbound
file needs any more are taken out of the configuration last. A file that is bound is served
whether a pattern names it or not, so that every file can be served whenever this ends.
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.config_files import SYSTEM_CONFIG_DIR
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import ConfigInvalid, InputUnreadable, UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, detect, served_name
from kmsfs.formats.esdk_header import read_header
from kmsfs.manage.decrypt import MAX_CIPHERTEXT_BYTES, decrypted
from kmsfs.manage.encrypt import encrypt_bound, next_version, users_pairs
from kmsfs.manage.gate import Gate
from kmsfs.manage.input import absolute
from kmsfs.manage.keys import KeyOptions, KeyServices, settings_for
from kmsfs.manage.original import Original, read_original
from kmsfs.manage.output import write_file
from kmsfs.manage.place import VolumeHere, Volumes, place_of, volume_above
from kmsfs.manage.plan import FilePlan, plan_in_place
from kmsfs.manage.pool import Outcome, Work
from kmsfs.manage.reencrypt import verify_message
from kmsfs.manage.tree import is_ciphertext
from kmsfs.manage.volume import unbound_files
from kmsfs.settings import path_matches

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """What the command line says.

    Attributes:
        key_id: of the bound messages; None takes the volume's first.
        keys: how files are decrypted.
        dry_run: only tell what would be done; KMS is not asked.
        force: also bind what `unbound` does not name, and what is thereby served.
    """

    key_id: str | None
    keys: KeyOptions
    dry_run: bool
    force: bool


def plan_migration(directory: str) -> tuple[VolumeHere, FilePlan]:
    """The volume of a directory, and all files below that directory.

    Raises:
        UsageInvalid: it belongs to no volume.
        InputUnreadable: a directory is missing or cannot be read.
        ConfigInvalid, ConfigUntrusted: the volume cannot be honoured.
    """
    if not os.path.isdir(directory):
        raise InputUnreadable(f"{directory} is not a directory")
    volume = volume_above(absolute(directory))
    if volume is None:
        raise UsageInvalid(
            f"no kmsfs.toml lies in or above {directory}", hint="make a volume with `kmsfs init`"
        )
    return volume, plan_in_place([directory])


def migrate_work(plan: FilePlan, volume: VolumeHere, options: MigrateOptions, gate: Gate) -> Work:
    """What a worker does with each file of the plan. Plaintext stays in the worker."""
    services = KeyServices(gate)
    volumes = Volumes()

    def work(number: int) -> Outcome:
        _, path = plan.jobs[number]
        if path.name == VOLUME_FILE_NAME:
            return Outcome("skipped", detail=VOLUME_FILE_NAME)
        here = volumes.above(path.parent)
        if here is None or here.root != volume.root:
            return Outcome("skipped", detail="of another volume")
        if not is_ciphertext(path):
            return Outcome("skipped", detail="no ciphertext")
        original = read_original(path, max_bytes=MAX_CIPHERTEXT_BYTES)
        pairs: dict[str, str] = {}
        if detect(original.content) is Format.ESDK:
            content = original.content
            header = read_header(lambda at, size: content[at : at + size], len(content))
            if is_bound(header.encryption_context):
                return Outcome("skipped", detail="bound before")
            pairs = users_pairs(header.encryption_context)
        if not options.force and not volume.may_be_unbound(place_of(path, volume).path):
            warning = "it is bound to no place and not named under unbound, and left so"
            hint = "name it there, or add --force, if it is to be served"
            return Outcome("skipped", detail="not served", warnings=((warning, hint),))
        if not options.dry_run:
            bound = _bound(original, volume, pairs, options, services)
            write_file(path, bound, replace=True, like=original)
        return Outcome("done", output=os.path.relpath(path))

    return work


def forget_unbound(volume: VolumeHere) -> list[tuple[Path, str]]:
    """Take the patterns that match no unbound file out of the volume's configuration.

    That is its kmsfs.toml, and what /etc/kmsfs sets in its place. Comments and layout stay.

    Returns: each file with a pattern that was removed from it.
    Raises:
        InputUnreadable: the volume cannot be searched.
        ConfigInvalid: a file is not what it was.
        OutputUnwritable, CiphertextChanging: see `write_file`.
    """
    left = set(unbound_files(volume.root))
    needless = [
        pattern
        for pattern in volume.file.volume.unbound
        if not any(path_matches(pattern, served) for served in left)
    ]
    removed: list[tuple[Path, str]] = []
    if not needless:
        return removed
    for path in (volume.root / VOLUME_FILE_NAME, SYSTEM_CONFIG_DIR / f"{volume.name}.toml"):
        if path.exists():
            removed += [(path, pattern) for pattern in _remove_patterns(path, needless)]
    return removed


def _bound(
    original: Original,
    volume: VolumeHere,
    pairs: dict[str, str],
    options: MigrateOptions,
    services: KeyServices,
) -> bytes:
    settings = settings_for(volume, options.keys)
    if not settings.key_ids:
        raise UsageInvalid(f"volume {volume.name!r} has no key", hint="name one under key_ids")
    place = place_of(original.path, volume)
    keys = services.get(settings)
    rules = DecryptRules.of(
        settings,
        place,
        binding_required=False,
        unknown_as_blob=served_name(original.path.name)[1],
        max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
    )
    with decrypted(original.content, rules, keys) as (plaintext, _):
        made = encrypt_bound(
            bytes(plaintext),
            place,
            next_version(original.path),
            key_id=options.key_id or settings.key_ids[0],
            encryption_context={**pairs, **volume.file.kms.encryption_context},
            keys=keys,
        )
        allowed = volume.file.kms.key_ids
        if all(":key/" in allowed_id for allowed_id in allowed) and made.key_arn not in allowed:
            raise UsageInvalid(
                f"volume {volume.name!r} does not allow the key {made.key_arn}",
                hint="add that ARN to key_ids in kmsfs.toml first",
            )
        required = DecryptRules(
            encryption_context=volume.file.kms.encryption_context,
            place=place,
            binding_required=True,
            max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
        )
        verify_message(made, plaintext, required, keys)
    return made.ciphertext


def _remove_patterns(path: Path, needless: list[str]) -> list[str]:
    # Keeps comments, order and layout, which tomllib and tomli_w lose; needed nowhere else.
    import tomlkit

    original = read_original(path, max_bytes=_MAX_CONFIG_BYTES)
    text = original.content.decode()
    expected = tomllib.loads(text)
    patterns = expected.get("volume", {}).get("unbound", [])
    removed = [pattern for pattern in patterns if pattern in needless]
    if not removed:
        return []
    expected["volume"]["unbound"] = [one for one in patterns if one not in removed]
    document = tomlkit.parse(text)
    array = document["volume"]["unbound"]
    for number in reversed(range(len(patterns))):
        if patterns[number] in removed:
            del array[number]
    changed = tomlkit.dumps(document)
    if tomllib.loads(changed) != expected:
        raise ConfigInvalid(
            f"{path} cannot be changed without losing something",
            hint=f"take {', '.join(map(repr, removed))} out of unbound by hand",
        )
    write_file(path, changed.encode(), replace=True, like=original)
    return removed
