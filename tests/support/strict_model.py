"""Requests held against the service model that AWS publishes, as the service itself does."""

import base64
import binascii
import functools
import re
from collections.abc import Mapping
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, ServiceModel, Shape, StructureShape


class ServiceError(Exception):
    """An error to answer with.

    Attributes:
        code: as in `__type`.
        status: of HTTP.
    """

    def __init__(self, code: str, message: str | None = None, status: int = 400) -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.status = status


# KMS API Reference; all others are 400.
STATUSES = {
    "DependencyTimeoutException": 503,
    "KMSInternalException": 500,
    "KeyUnavailableException": 500,
    "InternalFailure": 500,
    "ServiceUnavailable": 503,
}


def error(code: str, message: str | None = None) -> ServiceError:
    """An error with the status that KMS gives it."""
    return ServiceError(code, message, STATUSES.get(code, 400))


@functools.cache
def kms_model() -> ServiceModel:
    """The service model of KMS."""
    return botocore.session.Session().get_service_model("kms")


def parse_input(operation: str, body: Any) -> dict[str, Any]:
    """A request's parameters with blobs decoded.

    Raises:
        ServiceError: an unknown operation, a wrong type, a value outside the model's bounds.
    """
    model = kms_model()
    if operation not in model.operation_names:
        raise ServiceError("UnknownOperationException", None, 404)
    shape = model.operation_model(operation).input_shape
    if shape is None:
        return {}
    found = _parse(shape, body, "")
    assert isinstance(found, dict)
    return found


def encode_output(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer with its blobs in base64."""
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in answer.items()
    }


def _parse(shape: Shape, value: Any, where: str) -> Any:
    match shape:
        case StructureShape():
            return _parse_structure(shape, value, where)
        case MapShape():
            _require(isinstance(value, dict))
            return {
                _parse(shape.key, k, where): _parse(shape.value, v, where) for k, v in value.items()
            }
        case ListShape():
            _require(isinstance(value, list))
            _check_bounds(shape, len(value), where, "length")
            return [_parse(shape.member, item, where) for item in value]
    match shape.type_name:
        case "blob":
            _require(isinstance(value, str))
            try:
                value = base64.b64decode(value, validate=True)
            except binascii.Error:
                raise ServiceError("SerializationException") from None
            _check_bounds(shape, len(value), where, "length")
        case "string":
            _require(isinstance(value, str))
            _check_bounds(shape, len(value), where, "length")
            allowed = shape.metadata.get("enum")
            if allowed and value not in allowed:
                raise _constraint(where, f"Member must satisfy enum value set: {allowed}")
            pattern = shape.metadata.get("pattern")
            if pattern and not re.fullmatch(pattern, value):
                raise _constraint(where, "Member must satisfy regular expression pattern")
        case "integer" | "long":
            _require(isinstance(value, int) and not isinstance(value, bool))
            _check_bounds(shape, value, where, "value")
        case "boolean":
            _require(isinstance(value, bool))
    return value


def _parse_structure(shape: StructureShape, value: Any, where: str) -> dict[str, Any]:
    _require(isinstance(value, dict))
    for name in shape.required_members:
        if value.get(name) is None:
            raise _constraint(_path(where, name), "Member must not be null")
    # Services ignore members that they do not know.
    return {
        name: _parse(member, value[name], _path(where, name))
        for name, member in shape.members.items()
        if value.get(name) is not None
    }


def _check_bounds(shape: Shape, size: int, where: str, what: str) -> None:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if low is not None and size < low:
        raise _constraint(where, f"Member must have {what} greater than or equal to {low}")
    if high is not None and size > high:
        raise _constraint(where, f"Member must have {what} less than or equal to {high}")


def _constraint(where: str, what: str) -> ServiceError:
    return ServiceError(
        "ValidationException",
        f"1 validation error detected: Value at '{where}' failed to satisfy constraint: {what}",
    )


def _path(where: str, name: str) -> str:
    name = name[0].lower() + name[1:]
    return f"{where}.{name}" if where else name


def _require(fits: bool) -> None:
    if not fits:
        raise ServiceError("SerializationException")
