"""`kmsfs encrypt` for one file: where it goes, what it is bound to, under which key."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kmsfs.errors import UsageInvalid
from kmsfs.formats import esdk
from kmsfs.formats.detect import SUFFIXES
from kmsfs.manage.encrypt import (
    check_is_plaintext,
    encrypt_bound,
    encrypt_raw,
    next_version,
    warnings_of,
)
from kmsfs.manage.input import STANDARD_INPUT, absolute, read_input
from kmsfs.manage.keys import KeyOptions, KeyServices, settings_for
from kmsfs.manage.output import check_output, write_file
from kmsfs.manage.place import VolumeHere, place_of, volume_above

_SUFFIX: Final = SUFFIXES[0]


@dataclass(frozen=True, slots=True)
class EncryptOptions:
    """What the command line says of how to encrypt.

    Attributes:
        output: a file or a directory; None puts FILE.encrypted beside FILE.
        path: served path of what comes from standard input.
        raw: write a bare KMS blob.
        unbound: bind to no place.
        force: replace an existing output, encrypt ciphertext.
    """

    output: str | None
    path: str | None
    raw: bool
    unbound: bool
    force: bool
    keys: KeyOptions


@dataclass(frozen=True, slots=True)
class EncryptedFile:
    """What was written, and what should be thought about: (warning, hint) pairs."""

    output: Path
    warnings: tuple[tuple[str, str], ...]


def encrypt_file(name: str, options: EncryptOptions, services: KeyServices) -> EncryptedFile:
    """Encrypt one file, or standard input for `-`; the output is replaced whole or not at all.

    Raises:
        UsageInvalid: the options do not go together, or lack a key or a place.
        InputUnreadable, OutputExists, OutputUnwritable, ConfigInvalid, ConfigUntrusted,
        PlaintextTooLarge: see their classes.
        KmsfsError: as `KeyService` raises.
    """
    output = _output_path(name, options)
    volume = volume_above(output.parent)
    path = place_of(output, volume).path
    if options.path is not None and path != options.path:
        raise UsageInvalid(
            f"{output} would be served as {path!r}, not as {options.path!r}",
            hint="leave out --path or -o",
        )
    return encrypt_to(name, output, volume, options, services)


def encrypt_to(
    name: str,
    output: Path,
    volume: VolumeHere | None,
    options: EncryptOptions,
    services: KeyServices,
) -> EncryptedFile:
    """As `encrypt_file`, to an output that lies in `volume`."""
    if name != STANDARD_INPUT and output.exists() and os.path.samefile(name, output):
        raise UsageInvalid("input and output are the same file")
    bound = not options.raw and not options.unbound
    if bound and volume is None:
        raise UsageInvalid(
            f"no kmsfs.toml lies in or above {output.parent}, so there is nothing to bind it to",
            hint="make a volume with `kmsfs init`, or add --unbound",
        )
    place = place_of(output, volume)
    check_output(output, replace=options.force)
    settings = settings_for(volume, options.keys)
    if not settings.key_ids:
        raise UsageInvalid("no key to encrypt under", hint="name one with --key-id")
    plaintext = read_input(name, max_bytes=esdk.MAX_PLAINTEXT_BYTES)
    if not options.force:
        check_is_plaintext(plaintext)
    # A message must carry the volume's pairs to be read there, so those given come on top.
    own_pairs = volume.file.kms.encryption_context if volume is not None else {}
    context = {**own_pairs, **options.keys.encryption_context}
    keys = services.get(settings)
    key_id = settings.key_ids[0]
    if options.raw:
        encrypted = encrypt_raw(plaintext, key_id=key_id, encryption_context=context, keys=keys)
    else:
        encrypted = encrypt_bound(
            plaintext,
            place if bound else None,
            next_version(output),
            key_id=key_id,
            encryption_context=context,
            keys=keys,
        )
    write_file(output, encrypted.ciphertext, replace=options.force)
    return EncryptedFile(output, tuple(warnings_of(volume, place.path, encrypted, bound=bound)))


def _output_path(name: str, options: EncryptOptions) -> Path:
    path = options.path
    if path is not None:
        _check_served_path(name, path)
    source_name = path if path is not None else name
    if options.output is None:
        if name != STANDARD_INPUT:
            return absolute(name + _SUFFIX)
        if path is None:
            raise UsageInvalid(
                "standard input has no name", hint="give it one with --path, or -o FILE"
            )
        volume = volume_above(Path.cwd())
        if volume is None:
            raise UsageInvalid(
                f"no kmsfs.toml lies in or above {Path.cwd()}", hint="say with -o where to put it"
            )
        return volume.root / (path + _SUFFIX)
    output = absolute(options.output)
    if options.output.endswith("/") or output.is_dir():
        if source_name == STANDARD_INPUT:
            raise UsageInvalid("standard input has no name", hint="give it one with --path")
        return output / (os.path.basename(source_name) + _SUFFIX)
    return output


def _check_served_path(name: str, path: str) -> None:
    if name != STANDARD_INPUT:
        raise UsageInvalid("--path names standard input; a file has its own name")
    if not path or os.path.isabs(path) or os.path.normpath(path) != path or path.startswith(".."):
        raise UsageInvalid(f"{path!r} is not a path within a volume")
