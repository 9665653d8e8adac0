"""The one place where an exception becomes a gRPC status.

Every status carries ``google.rpc.ErrorInfo`` (domain ``veneer``) and the detail
that the contract specifies for its code, in ``grpc-status-details-bin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

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
    InternalError,
    InvalidArgument,
    QuotaExceeded,
    RateLimitExceeded,
    Unavailable,
    VeneerError,
)

__all__ = [
    "DOMAIN",
    "MAX_MESSAGE",
    "MAX_VALUE",
    "GrpcStatus",
    "clip",
    "detail_for_log",
    "internal_error",
    "one_line",
    "to_grpc_status",
    "without_frames",
]

E = TypeVar("E", bound=BaseException)

DOMAIN: Final = "veneer"
"""``ErrorInfo.domain`` of every error."""

# By default, clients reject trailing metadata over 8 KiB, and then see no error at all. The
# message is sent three times (once percent-encoded), and binary details in base64.
MAX_MESSAGE: Final = 800
"""Most bytes of an error's message in any answer, gRPC or HTTP."""

MAX_VALUE: Final = 200
"""Most bytes of one metadata value."""

_MAX_ENTRIES: Final = 8

_UNAVAILABLE_RETRY_S: Final = 1.0

_FIELD_KEYS: Final = ("field", "file", "tensor", "key")
_SUBJECT_KEYS: Final = ("adapter", "name", "revision", "weights_digest")


class GrpcStatus(NamedTuple):
    """The arguments of ``ServicerContext.abort``."""

    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str | bytes], ...]


def internal_error(request_id: str) -> InternalError:
    """The error that a caller gets for a bug: the request id, and no internals."""
    return InternalError(
        f"internal error: report request id {request_id} with the server's log",
        metadata={"request_id": request_id},
    )


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


def detail_for_log(error: Exception) -> dict[str, str]:
    """What callers are not told of an error, as fields of a log line."""
    detail = error.detail if isinstance(error, VeneerError) else ""
    return {"detail": detail} if detail else {}


def clip(text: str, size: int) -> str:
    """At most ``size`` bytes of UTF-8."""
    data = text.encode()
    if len(data) <= size:
        return text
    return data[: size - 3].decode(errors="ignore") + "…"


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which may come from text that a
    caller sent."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


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


def without_frames(error: E) -> E:
    """The same error without tracebacks, including those of its causes.

    A refused call keeps its error until the next full garbage collection: gRPC's abort is
    part of a reference cycle, and so is an error held in a variable of the function that
    caught it. The traceback's frames would keep the caller's prompt alive for as long.
    """
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            todo += [one.__cause__, one.__context__]
    return error
