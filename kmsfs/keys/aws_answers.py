"""What KMS answers is believed only as far as it is what KMS can answer."""

import re
from collections.abc import Mapping
from typing import Any, Final

from kmsfs.errors import KmsAnswerInvalid

_KEY_ARN: Final = re.compile(r"arn:[^:]+:kms:[^:]+:[0-9]+:key/[^/:]+")


def take_bytes(answer: dict[str, Any], name: str, operation: str, max_bytes: int) -> bytes:
    """Take a field out of an answer, so that nothing else refers to it.

    Raises:
        KmsAnswerInvalid: it is missing, or not what KMS gives.
    """
    value = answer.pop(name, None)
    if not isinstance(value, bytes) or not 1 <= len(value) <= max_bytes:
        raise KmsAnswerInvalid(f"{operation}: {name} is missing or not what KMS gives")
    return value


def take_key_arn(answer: Mapping[str, Any], operation: str, key_id: str | None) -> str:
    """The ARN of the key that KMS used.

    Args:
        key_id: as it was sent, which the ARN has to fit.

    Raises:
        KmsAnswerInvalid: it is missing, or of another key.
    """
    arn = answer.get("KeyId")
    if not isinstance(arn, str) or not _KEY_ARN.fullmatch(arn):
        raise KmsAnswerInvalid(f"{operation}: KeyId is missing or no key ARN")
    if key_id is not None:
        is_alias = key_id.startswith("alias/") or ":alias/" in key_id
        named = arn if key_id.startswith("arn:") else arn.rpartition("/")[2]
        if not is_alias and named != key_id:
            raise KmsAnswerInvalid(f"{operation}: KMS answered with {arn} for {key_id}")
    return arn
