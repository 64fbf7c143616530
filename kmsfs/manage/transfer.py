"""`kmsfs mv` and `kmsfs cp`: a bound file is encrypted anew for the place where it goes.

The new file is verified as in `reencrypt`, and durable, before the old one is removed. What is
bound to no place goes as it is.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import FormatUnknown, InputUnreadable, UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.binding import is_bound
from kmsfs.formats.detect import Format, detect
from kmsfs.formats.esdk_header import EsdkHeader, read_header
from kmsfs.manage.decrypt import MAX_CIPHERTEXT_BYTES, decrypted
from kmsfs.manage.encrypt import encrypt_bound, next_version, users_pairs, warnings_of
from kmsfs.manage.gate import Gate
from kmsfs.manage.input import absolute
from kmsfs.manage.keys import KeyOptions, KeyServices, settings_for
from kmsfs.manage.original import Original, read_original
from kmsfs.manage.output import check_output, make_directories, remove_file, write_file
from kmsfs.manage.place import VolumeHere, Volumes, place_of
from kmsfs.manage.plan import FilePlan
from kmsfs.manage.pool import Outcome, Work
from kmsfs.manage.reencrypt import verify_message
from kmsfs.manage.tree import find_files, is_ciphertext


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """What the command line says.

    Attributes:
        move: whether the source is removed once its copy is durable.
        key_id: the key of bound files at their new place; None keeps their own within a volume,
            and takes the first of the other volume's.
        keys: how files are decrypted.
        force: replace what lies at the new place.
    """

    move: bool
    key_id: str | None
    keys: KeyOptions
    force: bool


def plan_transfer(
    sources: Sequence[str], target: str, *, recursive: bool, as_target: bool
) -> FilePlan:
    """Where each file goes: to `target`, or below it where that is a directory, as cp(1) has it.

    Args:
        recursive: whether directories may be among the sources.
        as_target: take `target` for the new name also where it is a directory.

    Raises:
        UsageInvalid: several sources and no directory; a directory without `recursive`, which is
            a volume itself, or goes into itself; a file onto itself.
        InputUnreadable: a source is missing or cannot be read.
    """
    into = os.path.isdir(target) and not as_target
    if not into and (len(sources) > 1 or (not as_target and target.endswith("/"))):
        raise UsageInvalid(f"{target} is not a directory")
    plan = FilePlan()
    for name in sources:
        source = absolute(name)
        there = absolute(target) / source.name if into else absolute(target)
        if not os.path.lexists(source):
            raise InputUnreadable(f"{name}: No such file or directory")
        if os.path.isdir(source) and not os.path.islink(source):
            if not recursive:
                raise UsageInvalid(f"{name} is a directory", hint="add -r to copy all below it")
            _plan_directory(plan, name, source, there)
        elif os.path.realpath(source) == os.path.realpath(there):
            raise UsageInvalid(f"{name} and {target} are the same file")
        else:
            plan.jobs.append((name, there))
    if len(set(plan.outputs)) < len(plan.jobs):
        raise UsageInvalid("two of the files have one name", hint="take them one by one")
    return plan


def transfer_work(plan: FilePlan, options: TransferOptions, gate: Gate) -> Work:
    """What a worker does with each file of the plan. Plaintext stays in the worker."""
    services = KeyServices(gate)
    volumes = Volumes()

    def work(number: int) -> Outcome:
        name, output = plan.jobs[number]
        if not is_ciphertext(name):
            raise FormatUnknown("it is no ciphertext", hint="mv(1) and cp(1) take plain files")
        original = read_original(absolute(name), max_bytes=MAX_CIPHERTEXT_BYTES)
        make_directories(output.parent)
        check_output(output, replace=options.force)
        one = _OneFile(original, output, volumes, services, options)
        made, warnings = one.new_content()
        if options.move:
            write_file(output, made, replace=options.force, like=original)
            original.check_unchanged()
            remove_file(original.path)
        else:
            mode = stat.S_IMODE(original.info.st_mode)
            write_file(output, made, replace=options.force, mode=mode)
        return Outcome("done", output=os.path.relpath(output), warnings=warnings)

    return work


def remove_empty_directories(names: Sequence[str]) -> list[str]:
    """Remove directories that were moved, with those below them, as far as nothing is in them.

    Returns: those of `names` that are still there.
    """
    for name in names:
        tree = find_files(Path(name))
        for path in (*reversed(tree.directories), ""):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(name, path))
    return [name for name in names if os.path.exists(name)]


def _plan_directory(plan: FilePlan, name: str, source: Path, there: Path) -> None:
    if (source / VOLUME_FILE_NAME).exists():
        raise UsageInvalid(
            f"{name} is a volume itself, whose files are bound within it",
            hint="mv(1) and cp -a take it as a whole",
        )
    real, real_there = os.path.realpath(source), os.path.realpath(there)
    if real_there == real or real_there.startswith(real + "/"):
        raise UsageInvalid(f"{name} cannot go into itself")
    tree = find_files(source)
    plan.jobs += [(os.path.join(name, path), there / path) for path in tree.files]
    plan.passed_over += [(os.path.join(name, path), kind) for path, kind in tree.passed_over]


@dataclass(frozen=True, slots=True)
class _OneFile:
    original: Original
    output: Path
    volumes: Volumes
    services: KeyServices
    options: TransferOptions

    def new_content(self) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        """What is to lie at the new place, verified; and warnings."""
        content = self.original.content
        volume = self.volumes.above(self.output.parent)
        if detect(content) is Format.ESDK:
            header = read_header(lambda at, size: content[at : at + size], len(content))
            if is_bound(header.encryption_context):
                return self._bound_anew(header, volume)
        path = place_of(self.output, volume).path
        if volume is None or volume.may_be_unbound(path):
            return content, ()
        text = f"it is bound to no place, so volume {volume.name!r} does not serve it"
        return content, ((text, "bind it with `kmsfs migrate --force`, or name it under unbound"),)

    def _bound_anew(
        self, header: EsdkHeader, volume: VolumeHere | None
    ) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        if volume is None:
            raise UsageInvalid(
                f"no kmsfs.toml lies in or above {self.output.parent}, so there is nothing to "
                "bind it to",
                hint="make a volume with `kmsfs init`",
            )
        source_volume = self.volumes.above(self.original.path.parent)
        settings = settings_for(source_volume, self.options.keys)
        place = place_of(self.output, volume)
        source_rules = DecryptRules.of(
            settings,
            place_of(self.original.path, source_volume),
            binding_required=False,
            unknown_as_blob=False,
            max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
        )
        target_settings = settings_for(volume, self.options.keys)
        keys = self.services.get(target_settings)
        within = source_volume is not None and source_volume.root == volume.root
        # Pairs that were the other volume's are not needed here; those of this one are.
        theirs = {} if source_volume is None else source_volume.file.kms.encryption_context
        own = users_pairs(header.encryption_context)
        pairs = {key: value for key, value in own.items() if within or theirs.get(key) != value}
        source_keys = self.services.get(settings)
        with decrypted(self.original.content, source_rules, source_keys) as (plaintext, info):
            key_id = self.options.key_id or (info.key_arn if within else self._first_key(volume))
            made = encrypt_bound(
                bytes(plaintext),
                place,
                max(next_version(self.output), next_version(self.original.path)),
                key_id=key_id,
                encryption_context={**pairs, **volume.file.kms.encryption_context},
                keys=keys,
            )
            rules = DecryptRules(
                encryption_context=volume.file.kms.encryption_context,
                place=place,
                binding_required=True,
                max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
            )
            verify_message(made, plaintext, rules, keys)
        return made.ciphertext, tuple(warnings_of(volume, place.path, made, bound=True))

    @staticmethod
    def _first_key(volume: VolumeHere) -> str:
        if not volume.file.kms.key_ids:
            raise UsageInvalid("no key to encrypt under", hint="name one with --key-id")
        return volume.file.kms.key_ids[0]
