"""Every committed ciphertext still gives what it gave: its plaintext, or its refusal."""

import hashlib
import json
from typing import Any

import msgspec
import pytest

from kmsfs import errors
from kmsfs.decryptor.decrypt import decrypt_ciphertext
from kmsfs.decryptor.rules import DecryptRules
from tests.support.local_keys import LocalKeys, key_arn
from tests.vectors.make import DIRECTORY, INDEX, PLACE, SEED

_VECTORS = json.loads(INDEX.read_text())
_DEFAULTS = {"key_ids": [key_arn(1)], "place": PLACE}


def test_every_vector_file_is_listed() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.bin")} == {v["name"] for v in _VECTORS}


@pytest.mark.parametrize("vector", _VECTORS, ids=lambda vector: vector["name"])
def test_vector_gives_its_outcome(vector: dict[str, Any]) -> None:
    data = (DIRECTORY / f"{vector['name']}.bin").read_bytes()
    rules = msgspec.convert({**_DEFAULTS, **vector["rules"]}, DecryptRules)
    buffers: list[bytearray] = []

    def allocate(size_bytes: int) -> memoryview:
        buffers.append(bytearray(size_bytes))
        return memoryview(buffers[-1])

    keys = LocalKeys(seed=SEED)
    outcome = vector["outcome"]
    if "error" in outcome:
        with pytest.raises(errors.KmsfsError) as caught:
            decrypt_ciphertext(data, rules, keys, allocate)
        assert type(caught.value) is getattr(errors, outcome["error"])
        assert not any(any(buffer) for buffer in buffers)
    else:
        info = decrypt_ciphertext(data, rules, keys, allocate)
        (buffer,) = buffers
        assert info.size_bytes == len(buffer) == outcome["size_bytes"]
        assert info.key_arn == key_arn(1)
        assert hashlib.sha256(buffer).hexdigest() == outcome["sha256"]
