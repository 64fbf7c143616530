"""Messages as the AWS Encryption SDK for Python writes them, under any suite and several keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import aws_encryption_sdk
from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy
from aws_encryption_sdk.key_providers.base import (
    MasterKey,
    MasterKeyConfig,
    MasterKeyProvider,
    MasterKeyProviderConfig,
)
from aws_encryption_sdk.structures import DataKey, EncryptedDataKey, MasterKeyInfo

from tests.support.local_keys import LocalKeys, key_arn


def sdk_message(
    keys: LocalKeys,
    plaintext: bytes,
    *,
    suite_id: int = 0x0578,
    frame_length: int = 4096,
    context: Mapping[str, str] | None = None,
    key_arns: Sequence[str] = (key_arn(1),),
) -> bytes:
    """Encrypt with the SDK itself; its data key wrapped under each of `key_arns`."""
    suite = AlgorithmSuite.get_by_id(suite_id)
    policy = (
        CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
        if suite.is_committing()
        else CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT
    )
    message, _ = aws_encryption_sdk.EncryptionSDKClient(commitment_policy=policy).encrypt(
        source=plaintext,
        key_provider=_Provider(keys=keys, key_arns=key_arns),
        algorithm=suite,
        frame_length=frame_length,
        encryption_context=dict(context or {}),
    )
    return message


class _Provider(MasterKeyProvider):
    provider_id = "aws-kms"
    _config_class = MasterKeyProviderConfig

    def __new__(cls, **_: Any) -> "_Provider":
        return super().__new__(cls)

    def __init__(self, *, keys: LocalKeys, key_arns: Sequence[str]) -> None:
        self._master_keys = [_Key(key_id=arn, keys=keys) for arn in key_arns]

    def master_keys_for_encryption(self, **_: Any) -> tuple["_Key", list["_Key"]]:
        return self._master_keys[0], self._master_keys

    def _new_master_key(self, key_id: bytes) -> MasterKey:
        raise NotImplementedError


class _Key(MasterKey):
    class _Config(MasterKeyConfig):
        provider_id = "aws-kms"

    provider_id = "aws-kms"
    _config_class = _Config

    def __new__(cls, *, key_id: str, **_: Any) -> "_Key":
        return super().__new__(cls, key_id=key_id)

    def __init__(self, *, key_id: str, keys: LocalKeys) -> None:
        self._arn = key_id
        self._keys = keys

    def _generate_data_key(self, algorithm: Any, encryption_context: Mapping[str, str]) -> DataKey:
        key = self._keys.generate_data_key(
            key_id=self._arn,
            size_bytes=algorithm.kdf_input_len,
            encryption_context=encryption_context,
        )
        return DataKey(
            key_provider=MasterKeyInfo(self.provider_id, key.key_arn),
            data_key=key.plaintext,
            encrypted_data_key=key.ciphertext,
        )

    def _encrypt_data_key(
        self, data_key: DataKey, algorithm: Any, encryption_context: Mapping[str, str]
    ) -> EncryptedDataKey:
        wrapped = self._keys.encrypt(
            data_key.data_key, key_id=self._arn, encryption_context=encryption_context
        )
        return EncryptedDataKey(
            key_provider=MasterKeyInfo(self.provider_id, wrapped.key_arn),
            encrypted_data_key=wrapped.ciphertext,
        )

    def _decrypt_data_key(
        self, encrypted_data_key: Any, algorithm: Any, encryption_context: Any
    ) -> DataKey:
        raise NotImplementedError
