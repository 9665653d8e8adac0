"""The one place where an exception becomes a gRPC status; the router on Ray uses it too.

Every status carries ``google.rpc.ErrorInfo`` (domain ``veneer``) and the detail
that the contract specifies for its code, in ``grpc-status-details-bin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterNotFound,
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    QuotaExceeded,
    RateLimitExceeded,
    Unavailable,
    VeneerError,
)

from veneer_server.errors import DOMAIN, MAX_MESSAGE, MAX_VALUE, clip, one_line

_MAX_ENTRIES: Final = 8

_UNAVAILABLE_RETRY_S: Final = 1.0

_FIELD_KEYS: Final = ("field", "file", "tensor", "key")
_SUBJECT_KEYS: Final = ("adapter", "name", "revision", "weights_digest")


class GrpcStatus(NamedTuple):
    """The arguments of ``ServicerContext.abort``."""

    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str | bytes], ...]


def to_grpc_status(error: VeneerError) -> GrpcStatus:
    """Code, message and trailing metadata of an error."""
    code: grpc.StatusCode = getattr(grpc.StatusCode, error.code)
    message = clip(one_line(error.message), MAX_MESSAGE)
    retry_s = error.retry_after_s
    if retry_s is None and isinstance(error, Unavailable):
        retry_s = _UNAVAILABLE_RETRY_S
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in _details(error, message, retry_s):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailing: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if retry_s is not None:
        trailing.append(("grpc-retry-pushback-ms", str(int(retry_s * 1000))))
    return GrpcStatus(code, message, tuple(trailing))


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((metadata[key] for key in keys if key in metadata), "")


def _details(error: VeneerError, message: str, retry_s: float | None) -> list[Message]:
    metadata = {
        key: clip(value, MAX_VALUE)
        for key, value in list(error.metadata.items())[:_MAX_ENTRIES]
    }
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    match error:
        case InvalidArgument():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=_first(metadata, _FIELD_KEYS), description=message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        case AdapterNotFound():
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type="veneer.v1.Adapter",
                    resource_name=_first(metadata, _SUBJECT_KEYS),
                    description=message,
                )
            )
        case FailedPrecondition():
            broken = error_details_pb2.PreconditionFailure.Violation(
                type=error.reason, subject=_first(metadata, _SUBJECT_KEYS), description=message
            )
            details.append(error_details_pb2.PreconditionFailure(violations=[broken]))
        case AdapterBudgetExceeded() | QuotaExceeded() | RateLimitExceeded() | DiskFull():
            over = error_details_pb2.QuotaFailure.Violation(
                subject=_first(metadata, ("account", *_SUBJECT_KEYS)), description=message
            )
            if "allowed" in metadata:
                over.quota_metric = metadata["limit"]
                over.quota_value = int(metadata["allowed"])
            details.append(error_details_pb2.QuotaFailure(violations=[over]))
    if retry_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details
