"""The operations of KMS that the strict stand-in knows, from the API reference."""

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.strict_keys import BlobInvalidError, KmsKey
from tests.support.strict_model import ServiceError, error
from tests.support.strict_state import Draft, StrictState

Given = dict[str, Any]
"""A request's parameters, validated, with blobs as bytes."""

_SYMMETRIC = "SYMMETRIC_DEFAULT"
_DATA_KEY_BYTES = {"AES_256": 32, "AES_128": 16}


def _decrypt(state: StrictState, draft: Draft, given: Given) -> Given:
    blob = given.get("CiphertextBlob")
    if blob is None and "IGNORE_CIPHERTEXT" in given.get("DryRunModifiers", ()):
        _usable_key(state, draft, given.get("KeyId"), "Decrypt", given)
    key = state.key_of_blob(draft, _required(blob), given.get("KeyId"), "Decrypt")
    plaintext = _open(key, _required(blob), given.get("EncryptionContext", {}))
    _end_dry_run(given)
    return {"KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": _SYMMETRIC}


def _encrypt(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _usable_key(state, draft, given["KeyId"], "Encrypt", given)
    blob = key.seal(given["Plaintext"], given.get("EncryptionContext", {}))
    return {"KeyId": key.arn, "CiphertextBlob": blob, "EncryptionAlgorithm": _SYMMETRIC}


def _generate_data_key(state: StrictState, draft: Draft, given: Given) -> Given:
    if ("NumberOfBytes" in given) == ("KeySpec" in given):
        raise error("ValidationException", "Please specify either number of bytes or key spec.")
    key = _usable_key(state, draft, given["KeyId"], draft.operation, given)
    plaintext = os.urandom(given.get("NumberOfBytes") or _DATA_KEY_BYTES[given["KeySpec"]])
    blob = key.seal(plaintext, given.get("EncryptionContext", {}))
    return {"KeyId": key.arn, "Plaintext": plaintext, "CiphertextBlob": blob}


def _generate_data_key_without_plaintext(state: StrictState, draft: Draft, given: Given) -> Given:
    if not {"NumberOfBytes", "KeySpec"} & given.keys():
        given = {**given, "KeySpec": "AES_256"}
    answer = _generate_data_key(state, draft, given)
    del answer["Plaintext"]
    return answer


def _re_encrypt(state: StrictState, draft: Draft, given: Given) -> Given:
    blob = _required(given.get("CiphertextBlob"))
    same = state.find_of_blob(blob) is state.find(draft, given["DestinationKeyId"])
    draft.facts = {"kms:ReEncryptOnSameKey": "true" if same else "false"}
    source = state.key_of_blob(draft, blob, given.get("SourceKeyId"), "ReEncryptFrom")
    target = state.find(draft, given["DestinationKeyId"])
    to_context = given.get("DestinationEncryptionContext", {})
    state.authorize(draft, target, "ReEncryptTo", context=to_context)
    state.use(draft, target, "ReEncryptTo")
    plaintext = _open(source, blob, given.get("SourceEncryptionContext", {}))
    _end_dry_run(given)
    return {
        "CiphertextBlob": target.seal(plaintext, to_context),
        "SourceKeyId": source.arn,
        "KeyId": target.arn,
        "SourceEncryptionAlgorithm": _SYMMETRIC,
        "DestinationEncryptionAlgorithm": _SYMMETRIC,
    }


def _describe_key(state: StrictState, draft: Draft, given: Given) -> Given:
    return {"KeyMetadata": _metadata(_managed_key(state, draft, given["KeyId"]))}


def _create_key(state: StrictState, draft: Draft, given: Given) -> Given:
    state.authorize(draft, None, "CreateKey")
    multi_region = given.get("MultiRegion", False)
    more: dict[str, Any] = {"key_id": f"mrk-{uuid.uuid4().hex}"} if multi_region else {}
    key = state.create_key(
        account=draft.identity.account,
        region=draft.region,
        usage=given.get("KeyUsage", "ENCRYPT_DECRYPT"),
        description=given.get("Description", ""),
        multi_region=multi_region,
        **more,
    )
    draft.key = key
    if "Policy" in given:
        try:
            _set_policy(state, draft, key, given)
        except ServiceError:
            state.forget_key(key)
            raise
    return {"KeyMetadata": _metadata(key)}


def _put_key_policy(state: StrictState, draft: Draft, given: Given) -> Given:
    _check_policy_name(given)
    key = _managed_key(state, draft, given["KeyId"])
    _refuse_pending_deletion(key)
    _set_policy(state, draft, key, given)
    return {}


def _get_key_policy(state: StrictState, draft: Draft, given: Given) -> Given:
    _check_policy_name(given)
    key = _managed_key(state, draft, given["KeyId"])
    return {"Policy": key.policy or _default_policy(key), "PolicyName": "default"}


def _enable_key_rotation(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["KeyId"])
    if key.state == "Disabled":
        raise error("DisabledException", f"{key.arn} is disabled.")
    _refuse_pending_deletion(key)
    key.rotation = True
    return {}


def _get_key_rotation_status(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["KeyId"])
    answer: Given = {"KeyId": key.arn, "KeyRotationEnabled": key.rotation}
    return {**answer, "RotationPeriodInDays": 365} if key.rotation else answer


def _create_alias(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["TargetKeyId"])
    # On the alias too, which only IAM policies can allow.
    state.authorize(draft, None, "CreateAlias")
    name = given["AliasName"]
    if not name.startswith("alias/") or name.startswith("alias/aws/"):
        raise error("ValidationException", "Alias must start with the prefix 'alias/'.")
    _refuse_pending_deletion(key)
    state.create_alias(name, key)
    return {}


def _disable_key(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["KeyId"])
    _refuse_pending_deletion(key)
    key.state = "Disabled"
    return {}


def _enable_key(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["KeyId"])
    _refuse_pending_deletion(key)
    key.state = "Enabled"
    return {}


def _schedule_key_deletion(state: StrictState, draft: Draft, given: Given) -> Given:
    days = given.get("PendingWindowInDays", 30)
    if not 7 <= days <= 30:
        raise error("ValidationException", "PendingWindowInDays must be from 7 to 30")
    key = _managed_key(state, draft, given["KeyId"])
    _refuse_pending_deletion(key)
    key.state = "PendingDeletion"
    return {"KeyId": key.arn, "DeletionDate": time.time() + days * 86400, "KeyState": key.state}


def _cancel_key_deletion(state: StrictState, draft: Draft, given: Given) -> Given:
    key = _managed_key(state, draft, given["KeyId"])
    if key.state != "PendingDeletion":
        raise error("KMSInvalidStateException", f"{key.arn} is not pending deletion.")
    key.state = "Disabled"
    return {"KeyId": key.arn}


OPERATIONS: Mapping[str, Callable[[StrictState, Draft, Given], Given]] = {
    "CancelKeyDeletion": _cancel_key_deletion,
    "CreateAlias": _create_alias,
    "CreateKey": _create_key,
    "Decrypt": _decrypt,
    "DescribeKey": _describe_key,
    "DisableKey": _disable_key,
    "EnableKey": _enable_key,
    "EnableKeyRotation": _enable_key_rotation,
    "Encrypt": _encrypt,
    "GenerateDataKey": _generate_data_key,
    "GenerateDataKeyWithoutPlaintext": _generate_data_key_without_plaintext,
    "GetKeyPolicy": _get_key_policy,
    "GetKeyRotationStatus": _get_key_rotation_status,
    "PutKeyPolicy": _put_key_policy,
    "ReEncrypt": _re_encrypt,
    "ScheduleKeyDeletion": _schedule_key_deletion,
}
"""By name: given state, what is known of the request, and its parameters, the answer."""


def _usable_key(
    state: StrictState, draft: Draft, key_id: str | None, operation: str, given: Given
) -> KmsKey:
    key = state.find(draft, _required(key_id, "keyId"))
    state.authorize(draft, key, operation)
    state.use(draft, key, operation)
    _end_dry_run(given)
    return key


def _managed_key(state: StrictState, draft: Draft, key_id: str) -> KmsKey:
    key = state.find(draft, key_id)
    state.authorize(draft, key, draft.operation)
    return key


def _set_policy(state: StrictState, draft: Draft, key: KmsKey, given: Given) -> None:
    bypass_check = given.get("BypassPolicyLockoutSafetyCheck", False)
    state.set_policy(draft, key, given["Policy"], bypass_check=bypass_check)


def _check_policy_name(given: Given) -> None:
    if given.get("PolicyName", "default") != "default":
        raise error("NotFoundException", "No such policy exists")


def _default_policy(key: KmsKey) -> str:
    root = f"arn:aws:iam::{key.account}:root"
    statement = {
        "Sid": "Enable IAM User Permissions",
        "Effect": "Allow",
        "Principal": {"AWS": root},
        "Action": "kms:*",
        "Resource": "*",
    }
    return json.dumps({"Version": "2012-10-17", "Id": "key-default-1", "Statement": [statement]})


def _required(value: Any, name: str = "ciphertextBlob") -> Any:
    if value is None:
        raise error("ValidationException", f"Value at '{name}' failed: Member must not be null")
    return value


def _refuse_pending_deletion(key: KmsKey) -> None:
    if key.state == "PendingDeletion":
        raise error("KMSInvalidStateException", f"{key.arn} is pending deletion.")


def _open(key: KmsKey, blob: bytes, context: Mapping[str, str]) -> bytes:
    try:
        return key.open(blob, context)
    except BlobInvalidError:
        raise error("InvalidCiphertextException") from None


def _end_dry_run(given: Given) -> None:
    if given.get("DryRun"):
        raise error(
            "DryRunOperationException",
            "The request would have succeeded, but the DryRun option is set.",
        )


def _metadata(key: KmsKey) -> Given:
    return {
        "AWSAccountId": key.account,
        "KeyId": key.key_id,
        "Arn": key.arn,
        "Enabled": key.state == "Enabled",
        "KeyState": key.state,
        "KeyUsage": key.usage,
        "KeyManager": "CUSTOMER",
        "KeySpec": _SYMMETRIC,
        "EncryptionAlgorithms": [_SYMMETRIC],
        "Description": key.description,
        "MultiRegion": key.multi_region,
        "Origin": "AWS_KMS",
    }
