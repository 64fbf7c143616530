"""`kmsfs reencrypt`: files under a new key, or under the newest material of their own.

An Encryption SDK message cannot be wrapped anew, since its header is authenticated: it is
decrypted and encrypted in a worker, keeps its encryption context and its place, and gets a higher
version. A bare blob goes through KMS ReEncrypt, so that its plaintext never leaves KMS.

Before a file is replaced, the new one is verified. A message is decrypted, its data key by KMS,
and compared with what the old one held. Of a bare blob KMS is asked to re-encrypt the new one
under its own key, and the answer is thrown away: to give it, KMS has to decrypt, and shows the
plaintext to nobody. DryRun would only tell that this caller may.
"""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass

from kmsfs.config import VOLUME_FILE_NAME
from kmsfs.decryptor.rules import DecryptRules
from kmsfs.errors import (
    CiphertextInvalid,
    FormatUnknown,
    IncorrectKey,
    KeyNotAllowed,
    KmsAnswerInvalid,
    UsageInvalid,
)
from kmsfs.formats import esdk, kms_blob
from kmsfs.formats.binding import VOLUME_KEY, Place, check_place, is_bound
from kmsfs.formats.detect import Format, detect, served_name
from kmsfs.formats.esdk_header import EsdkHeader, read_header
from kmsfs.keys.service import KeyService, ReEncryption
from kmsfs.manage.decrypt import MAX_CIPHERTEXT_BYTES, decrypted
from kmsfs.manage.encrypt import Encrypted, encrypt_bound, next_version, users_pairs
from kmsfs.manage.gate import Gate
from kmsfs.manage.input import absolute
from kmsfs.manage.keys import KeyOptions, KeyServices, settings_for
from kmsfs.manage.original import Original, read_original
from kmsfs.manage.output import write_file
from kmsfs.manage.place import VolumeHere, Volumes, place_of
from kmsfs.manage.plan import FilePlan
from kmsfs.manage.pool import Outcome, Work
from kmsfs.manage.tree import is_ciphertext
from kmsfs.settings import KmsSettings


@dataclass(frozen=True, slots=True)
class ReencryptOptions:
    """What the command line says of how to re-encrypt.

    Attributes:
        key_id: the new key; None keeps each file's own.
        keys: how files are decrypted; its key_ids are empty, for a volume's own hold.
        dry_run: only tell what would be done; KMS is asked for the ARN of `key_id` at most.
        written_before: skip files written at or after this time, as time.time() has it.
    """

    key_id: str | None
    keys: KeyOptions
    dry_run: bool
    written_before: float | None


def check_new_key(names: Sequence[str], options: ReencryptOptions) -> None:
    """Make sure that every volume of these files and directories allows the new key.

    Raises:
        UsageInvalid: one would not serve what is encrypted under it.
        ConfigInvalid, ConfigUntrusted: a volume cannot be honoured.
        KmsfsError: as `KeyService.resolve_key_arn`.
    """
    new_keys = _NewKeys(options, KeyServices())
    for name in names:
        path = absolute(name)
        volume = Volumes().above(path if path.is_dir() else path.parent)
        new_keys.of(volume, settings_for(volume, options.keys))


def reencrypt_work(plan: FilePlan, options: ReencryptOptions, gate: Gate) -> Work:
    """What a worker does with each file of the plan. Plaintext stays in the worker, or in KMS."""
    services = KeyServices(gate)
    volumes = Volumes()
    new_keys = _NewKeys(options, services)

    def work(number: int) -> Outcome:
        name, path = plan.jobs[number]
        if path.name == VOLUME_FILE_NAME:
            return Outcome("skipped", detail=VOLUME_FILE_NAME)
        if not is_ciphertext(path):
            if name in plan.named:
                raise FormatUnknown("the file is of no known format")
            return Outcome("skipped", detail="no ciphertext")
        original = read_original(path, max_bytes=MAX_CIPHERTEXT_BYTES)
        if options.written_before is not None and original.info.st_mtime >= options.written_before:
            return Outcome("skipped", detail="written since")
        volume = volumes.above(path.parent)
        settings = settings_for(volume, options.keys)
        key_arn = new_keys.of(volume, settings)
        one = _OneFile(original, volume, settings, key_arn, services, dry_run=options.dry_run)
        is_message = detect(original.content) is Format.ESDK
        new = one.new_message() if is_message else one.new_blob()
        if new is None:
            return Outcome("skipped", detail="under this key before")
        if not options.dry_run:
            write_file(path, new, replace=True, like=original)
        return Outcome("done", output=os.path.relpath(path))

    return work


def reseal(
    original: Original,
    header: EsdkHeader,
    plaintext: bytes,
    place: Place | None,
    *,
    key_id: str,
    keys: KeyService,
) -> Encrypted:
    """Encrypt a message's plaintext anew, for the place where it lies: same pairs, next version.

    Args:
        place: None for a message that is bound to none.

    Raises: as `encrypt_bound`.
    """
    context = header.encryption_context
    if place is not None and VOLUME_KEY not in context:
        place = Place(None, place.path)
    return encrypt_bound(
        plaintext,
        place,
        next_version(original.path),
        key_id=key_id,
        encryption_context=users_pairs(context),
        keys=keys,
    )


def verify_message(
    made: Encrypted, plaintext: bytes | memoryview, rules: DecryptRules, keys: KeyService
) -> None:
    """Decrypt what was encrypted, by KMS, and compare.

    Args:
        rules: those of the place where it will lie; the key is the one that it is under.

    Raises:
        CiphertextInvalid: it holds something else.
        KmsfsError: as `decrypt_ciphertext`.
    """
    rules = DecryptRules(
        key_ids=(made.key_arn,),
        encryption_context=rules.encryption_context,
        place=rules.place,
        binding_required=rules.binding_required,
        max_plaintext_bytes=rules.max_plaintext_bytes,
    )
    with decrypted(made.ciphertext, rules, keys) as (content, _):
        if content != plaintext:
            raise CiphertextInvalid("what was encrypted decrypts to something else")


class _NewKeys:
    """The ARN of the new key, under each volume's settings; None where files keep their own."""

    def __init__(self, options: ReencryptOptions, services: KeyServices) -> None:
        self._key_id = options.key_id
        self._services = services
        self._arns: dict[str | None, str] = {}

    def of(self, volume: VolumeHere | None, settings: KmsSettings) -> str | None:
        """Raises: as `check_new_key`."""
        if self._key_id is None:
            return None
        name = None if volume is None else volume.name
        if name not in self._arns:
            keys = self._services.get(settings)
            arn = self._key_id
            if not arn.startswith("arn:") or ":key/" not in arn:
                arn = keys.resolve_key_arn(arn)
            self._arns[name] = arn
        arn = self._arns[name]
        if volume is not None:
            allowed = volume.file.kms.key_ids
            if all(":key/" in key_id for key_id in allowed) and arn not in allowed:
                raise UsageInvalid(
                    f"volume {volume.name!r} does not allow the key {arn}",
                    hint="add that ARN to key_ids in kmsfs.toml first",
                )
        return arn


@dataclass(frozen=True, slots=True)
class _OneFile:
    """A file, and where it lies. `new_key_arn` is None where it stays under its own key."""

    original: Original
    volume: VolumeHere | None
    settings: KmsSettings
    new_key_arn: str | None
    services: KeyServices
    dry_run: bool

    def new_message(self) -> bytes | None:
        """The message encrypted anew and verified; None if it is under the new key already."""
        content = self.original.content
        header = read_header(lambda at, size: content[at : at + size], len(content))
        if self.new_key_arn is not None and header.key_arns == (self.new_key_arn,):
            return None
        place = place_of(self.original.path, self.volume)
        check_place(header.encryption_context, place, required=False)
        if self.dry_run:
            return b""
        rules = self._rules(place)
        keys = self.services.get(self.settings)
        with decrypted(content, rules, keys) as (plaintext, info):
            made = reseal(
                self.original,
                header,
                bytes(plaintext),
                place if is_bound(header.encryption_context) else None,
                key_id=self.new_key_arn or info.key_arn,
                keys=keys,
            )
            verify_message(made, plaintext, rules, keys)
        return made.ciphertext

    def new_blob(self) -> bytes | None:
        """The blob re-encrypted by KMS and verified, in the form that it had; None if it is under
        the new key already."""
        content = self.original.content
        unknown = detect(content) is Format.UNKNOWN
        blob = content
        if unknown:
            blob = kms_blob.guess_blob(content)
        elif detect(content) is Format.KMS_BLOB_BASE64:
            blob = kms_blob.decode_base64(content)
        if self.dry_run:
            return b""
        made = self._re_encrypt(blob)
        if made.source_key_arn == self.new_key_arn:
            return None
        keys = self.services.get(self.settings)
        again = keys.re_encrypt(
            made.ciphertext,
            source_key_id=made.key_arn,
            key_id=made.key_arn,
            encryption_context=self.settings.encryption_context,
        )
        if again.source_key_arn != made.key_arn:
            raise KmsAnswerInvalid(f"KMS encrypted under {again.source_key_arn} in place of a key")
        if blob is content:
            return made.ciphertext
        line_end = b"\n" if content.endswith(b"\n") else b""
        return base64.b64encode(made.ciphertext) + line_end

    def _re_encrypt(self, blob: bytes) -> ReEncryption:
        if len(blob) > kms_blob.MAX_CIPHERTEXT_BYTES:
            raise CiphertextInvalid(f"{len(blob)} bytes are too many for a KMS ciphertext blob")
        keys = self.services.get(self.settings)
        sources: Sequence[str | None] = (None,) if self.settings.any_key else self._key_ids()
        for source in sources:
            target = self.new_key_arn or source
            if target is None:
                raise UsageInvalid(
                    "a bare KMS ciphertext blob does not name its key",
                    hint="name the key to encrypt under with --key-id",
                )
            try:
                return keys.re_encrypt(
                    blob,
                    source_key_id=source,
                    key_id=target,
                    encryption_context=self.settings.encryption_context,
                )
            except IncorrectKey:
                continue
        raise IncorrectKey(f"none of the allowed keys encrypted it: {', '.join(self._key_ids())}")

    def _key_ids(self) -> tuple[str, ...]:
        """Keys that may be asked to decrypt."""
        key_ids = self.settings.key_ids
        if not key_ids:
            raise KeyNotAllowed(
                f"{self.original.path.name} lies in no volume that allows a key",
                hint="add --any-key to decrypt it under the key that it is under",
            )
        return key_ids

    def _rules(self, place: Place) -> DecryptRules:
        any_key = self.settings.any_key
        return DecryptRules(
            key_ids=() if any_key else self._key_ids(),
            any_key=any_key,
            encryption_context=self.settings.encryption_context,
            place=place,
            unknown_as_blob=served_name(self.original.path.name)[1],
            max_plaintext_bytes=esdk.MAX_PLAINTEXT_BYTES,
            allow_non_committing=self.settings.allow_non_committing,
        )
