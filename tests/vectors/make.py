"""Writes the format vectors: small ciphertext files, and what decrypting each must give.

    python -m tests.vectors.make

The files are committed, so that what was once readable stays readable and what was once refused
stays refused. Keys are those of `LocalKeys(seed=SEED)`; IVs and data keys are random, so every
run writes other files with the same outcomes.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.esdk_writer import EsdkWriter, WrittenKey
from tests.support.local_keys import LocalKeys, key_arn
from tests.support.sdk_messages import sdk_message

SEED = b"vectors"
DIRECTORY = Path(__file__).parent
INDEX = DIRECTORY / "vectors.json"

CONTEXT = {"service": "web"}
PLACE = {"volume": "web", "path": "nginx/ssl.pem"}
BOUND = {"kmsfs:volume": "web", "kmsfs:path": "nginx/ssl.pem", "kmsfs:version": "1"}
PASSWORD = b"correct horse battery staple"
LONG = bytes(range(256)) * 3

_ALL_SUITES = (
    0x0014,
    0x0046,
    0x0078,
    0x0114,
    0x0146,
    0x0178,
    0x0214,
    0x0346,
    0x0378,
    0x0478,
    0x0578,
)


class Vectors:
    """Collects vectors and writes them."""

    def __init__(self) -> None:
        self.keys = LocalKeys(seed=SEED)
        self.index: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        data: bytes,
        *,
        plaintext: bytes | None = None,
        error: str | None = None,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        """One file, and its outcome under `rules` (over key 1 and PLACE)."""
        (DIRECTORY / f"{name}.bin").write_bytes(data)
        outcome = {"error": error}
        if plaintext is not None:
            digest = hashlib.sha256(plaintext).hexdigest()
            outcome = {"size_bytes": len(plaintext), "sha256": digest}
        self.index.append({"name": name, "rules": dict(rules or {}), "outcome": outcome})

    def blob(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """A bare blob under key 1."""
        return self.keys.encrypt(
            plaintext, key_id=key_arn(1), encryption_context=context
        ).ciphertext

    def writer(self, **options: Any) -> EsdkWriter:
        """A hand-written message under key 1."""
        writer = EsdkWriter(os.urandom(32), [], **options)
        context = {**writer.context, **(writer.public_key_pair() if writer.signed else {})}
        wrapped = self.keys.encrypt(
            writer.data_key, key_id=key_arn(1), encryption_context=context
        ).ciphertext
        writer.keys = [WrittenKey(b"aws-kms", key_arn(1).encode(), wrapped)]
        return writer


def _blobs(vectors: Vectors) -> None:
    with_context = {"encryption_context": CONTEXT}
    blob = vectors.blob(PASSWORD, CONTEXT)
    text = base64.b64encode(blob)
    vectors.add("blob", blob, plaintext=PASSWORD, rules=with_context)
    vectors.add("blob-base64", text, plaintext=PASSWORD, rules=with_context)
    vectors.add(
        "blob-base64-lines", base64.encodebytes(blob), plaintext=PASSWORD, rules=with_context
    )
    crlf = b"  " + base64.encodebytes(blob).replace(b"\n", b"\r\n")
    vectors.add("blob-base64-crlf", crlf, plaintext=PASSWORD, rules=with_context)
    vectors.add("blob-wrong-context", blob, error="CiphertextInvalid")
    vectors.add("blob-cut-short", blob[:-1], error="CiphertextInvalid", rules=with_context)
    vectors.add("blob-trailing-byte", blob + b"\n", error="CiphertextInvalid", rules=with_context)
    vectors.add("blob-base64-cut-short", text[:-1], error="CiphertextInvalid", rules=with_context)
    trailing = text + b"!"
    vectors.add("blob-base64-trailing", trailing, error="CiphertextInvalid", rules=with_context)
    wrong_key = {**with_context, "key_ids": [key_arn(2)]}
    vectors.add("blob-wrong-key", blob, error="IncorrectKey", rules=wrong_key)
    second_key = {**with_context, "key_ids": [key_arn(2), key_arn(1)]}
    vectors.add("blob-second-key", blob, plaintext=PASSWORD, rules=second_key)
    any_key = {**with_context, "key_ids": [], "any_key": True}
    vectors.add("blob-any-key", blob, plaintext=PASSWORD, rules=any_key)
    no_key = {**with_context, "key_ids": []}
    vectors.add("blob-no-key", blob, error="KeyNotAllowed", rules=no_key)
    bound = {**with_context, "binding_required": True}
    vectors.add("blob-binding-required", blob, error="NotBound", rules=bound)


def _messages(vectors: Vectors) -> None:
    older = {"allow_non_committing": True}
    for suite_id in _ALL_SUITES:
        message = sdk_message(vectors.keys, PASSWORD, suite_id=suite_id, context=CONTEXT)
        name = f"message-{suite_id:04x}"
        vectors.add(name, message, plaintext=PASSWORD, rules=older)
        if suite_id < 0x0400:
            vectors.add(f"{name}-refused", message, error="AlgorithmNotAllowed")
    for name, size, frame_length in (
        ("empty", 0, 128),
        ("one-byte", 1, 128),
        ("one-frame", 128, 128),
        ("six-frames", 768, 128),
        ("unframed", 768, 0),
        ("unframed-empty", 0, 0),
    ):
        message = sdk_message(vectors.keys, LONG[:size], frame_length=frame_length)
        vectors.add(f"message-{name}", message, plaintext=LONG[:size])
    full = vectors.writer(signed=True).message(LONG, full_final_frame=True)
    vectors.add("message-full-final-frame", full, plaintext=LONG)
    whole = vectors.writer().message(LONG)
    vectors.add("message-cut-short", whole[:-1], error="CiphertextInvalid")
    vectors.add("message-trailing-byte", whole + b"\0", error="CiphertextInvalid")
    vectors.add("message-header-only", whole[:300], error="CiphertextInvalid")
    # The final frame's position can be computed, so a missing frame shows only when decrypting.
    writer = vectors.writer()
    writer.header()
    writer.frame(2, LONG[:128])
    writer.final_frame(2, b"")
    vectors.add("message-frames-out-of-order", writer.written, error="CiphertextInvalid")
    writer = vectors.writer()
    writer.header(commitment=bytes(32))
    writer.final_frame(1, PASSWORD)
    vectors.add("message-other-commitment", writer.written, error="CiphertextInvalid")
    writer = vectors.writer(signed=True)
    writer.header()
    writer.final_frame(1, PASSWORD)
    vectors.add("message-unsigned-end", writer.written, error="CiphertextInvalid")


def _bindings(vectors: Vectors) -> None:
    required = {"binding_required": True}
    bound = sdk_message(vectors.keys, PASSWORD, context=BOUND)
    vectors.add("bound", bound, plaintext=PASSWORD, rules=required)
    elsewhere = {"place": {"volume": "web", "path": "nginx/other.pem"}}
    vectors.add("bound-moved", bound, error="ContextMismatch", rules=elsewhere)
    other_volume = {"place": {"volume": "mail", "path": "nginx/ssl.pem"}}
    vectors.add("bound-other-volume", bound, error="ContextMismatch", rules=other_volume)
    no_volume = {"place": {"volume": None, "path": "nginx/ssl.pem"}}
    vectors.add("bound-no-volume", bound, error="ContextMismatch", rules=no_volume)
    unbound = sdk_message(vectors.keys, PASSWORD, context=CONTEXT)
    vectors.add("unbound-required", unbound, error="NotBound", rules=required)
    pairs = {"encryption_context": CONTEXT}
    vectors.add("pairs-there", unbound, plaintext=PASSWORD, rules=pairs)
    vectors.add("pairs-missing", bound, error="ContextMismatch", rules=pairs)
    not_allowed = {"key_ids": [key_arn(2)], "any_key": True}
    vectors.add("message-key-not-allowed", bound, error="KeyNotAllowed", rules=not_allowed)
    too_large = {"max_plaintext_bytes": len(PASSWORD) - 1}
    vectors.add("message-too-large", bound, error="FileTooLarge", rules=too_large)
    vectors.add("empty-file", b"", error="CiphertextInvalid")
    vectors.add("text", b"-----BEGIN CERTIFICATE-----\n", error="FormatUnknown")
    tried = {"unknown_as_blob": True}
    vectors.add("text-tried-as-blob", b"not a blob", error="CiphertextInvalid", rules=tried)


def main() -> None:
    """Write all vectors over those that are there."""
    for old in DIRECTORY.glob("*.bin"):
        old.unlink()
    vectors = Vectors()
    _blobs(vectors)
    _messages(vectors)
    _bindings(vectors)
    INDEX.write_text(json.dumps(vectors.index, indent=1) + "\n")


if __name__ == "__main__":
    main()
