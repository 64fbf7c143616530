"""Trying a volume's keys on its files: what KMS would decrypt, or decrypts, for this identity."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kmsfs.errors import CiphertextInvalid, IncorrectKey, KmsfsError
from kmsfs.formats import esdk
from kmsfs.formats.binding import PATH_KEY, VERSION_KEY
from kmsfs.keys.service import Decryption, DecryptProbe

# Pairs that differ from file to file: no policy of kmsfs depends on them.
_OF_ONE_FILE: Final = (PATH_KEY, VERSION_KEY)


class WouldDecryptError(Exception):
    """KMS would decrypt this; there is no plaintext to go on with."""


@dataclass(frozen=True, slots=True)
class _Question:
    key_id: str | None
    context: frozenset[tuple[str, str]]


class KeyTrial:
    """A `Decrypter` that asks KMS as seldom as it can.

    With `for_real` every file is decrypted. Otherwise KMS is asked whether it would, once for
    each key and encryption context, paths and versions aside, with the first file's ciphertext.
    A key that KMS refuses or cannot be reached for is not asked again in that context.

    Attributes:
        for_real: as given.
        files: how many ciphertexts each key decrypts, or would.
        every_file: ask for each ciphertext, since the key alone does not tell whether KMS would
            decrypt it.
    """

    def __init__(self, keys: DecryptProbe, *, for_real: bool) -> None:
        self._keys = keys
        self.for_real: Final = for_real
        self._refused: dict[_Question, KmsfsError] = {}
        self._would: set[_Question] = set()
        self.files: Final = Counter[str | None]()
        self.every_file = False

    def decrypt(
        self, ciphertext: bytes, *, key_id: str | None, encryption_context: Mapping[str, str]
    ) -> Decryption:
        """As `Decrypter.decrypt`.

        Raises:
            WouldDecryptError: it was not for real, and it would.
        """
        question = _question(key_id, encryption_context)
        if (refused := self._refused.get(question)) is not None:
            raise refused
        if not self.for_real and question in self._would and not self.every_file:
            self.files[key_id] += 1
            raise WouldDecryptError
        try:
            if self.for_real:
                found = self._keys.decrypt(
                    ciphertext, key_id=key_id, encryption_context=encryption_context
                )
            else:
                self._keys.would_decrypt(
                    ciphertext, key_id=key_id, encryption_context=encryption_context
                )
        except (CiphertextInvalid, IncorrectKey):
            raise
        except KmsfsError as error:
            self._refused[question] = error
            raise
        self._would.add(question)
        self.files[key_id] += 1
        if self.for_real:
            return found
        raise WouldDecryptError

    def verdict(self, key_id: str, encryption_context: Mapping[str, str]) -> KmsfsError | None:
        """Why KMS does not decrypt under a key; None if it does.

        A refusal in any context counts. A key that was asked for nothing is asked for now.

        Args:
            encryption_context: of what might be encrypted under it.
        """
        for question, error in self._refused.items():
            if question.key_id == key_id:
                return error
        if all(question.key_id != key_id for question in self._would):
            try:
                self._keys.would_decrypt(None, key_id=key_id, encryption_context=encryption_context)
            except KmsfsError as error:
                return error
        return None


def _question(key_id: str | None, context: Mapping[str, str]) -> _Question:
    alike = {
        (key, value)
        for key, value in context.items()
        if key not in _OF_ONE_FILE and not key.startswith(esdk.RESERVED_CONTEXT_PREFIX)
    }
    return _Question(key_id, frozenset(alike))
