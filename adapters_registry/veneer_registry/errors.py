"""The one exception tree of Veneer, shared by server, clients and training.

Every class fixes two strings that are part of the contract: ``code``, the gRPC
status code's name, and ``reason``, the stable ``google.rpc.ErrorInfo`` reason.
The server maps an instance to a status, and the client rebuilds it from that::

    VeneerError
    ├── InvalidArgument
    │   ├── InvalidField            INVALID_FIELD
    │   ├── AdapterInvalid          ADAPTER_INVALID
    │   ├── ChecksumMismatch        CHECKSUM_MISMATCH
    │   ├── ContextTooLong          CONTEXT_TOO_LONG
    │   ├── MalformedMessage        MALFORMED_MESSAGE
    │   └── TemplateFailed          TEMPLATE_FAILED
    ├── Unauthenticated             UNAUTHENTICATED
    ├── PermissionDenied            PERMISSION_DENIED
    ├── AdapterNotFound             ADAPTER_NOT_FOUND
    ├── AdapterExists               ADAPTER_EXISTS
    ├── FailedPrecondition
    │   ├── BaseModelMismatch       BASE_MODEL_MISMATCH
    │   ├── AdapterInUse            ADAPTER_IN_USE
    │   ├── AdapterPinned           ADAPTER_PINNED
    │   ├── EtagMismatch            ETAG_MISMATCH
    │   ├── CatalogDamaged          CATALOG_DAMAGED
    │   └── StoreMismatch           STORE_MISMATCH  (start-up only, never on the wire)
    ├── ResourceExhausted
    │   ├── QueueFull               QUEUE_FULL
    │   ├── AdapterBudgetExceeded   ADAPTER_BUDGET_EXCEEDED
    │   ├── QuotaExceeded           QUOTA_EXCEEDED
    │   ├── RateLimitExceeded       RATE_LIMIT_EXCEEDED
    │   └── DiskFull                DISK_FULL
    ├── Unavailable
    │   ├── DiskFailed              DISK_FAILED
    │   ├── Draining                DRAINING
    │   ├── ModelLoading            MODEL_LOADING
    │   ├── EngineFailed            ENGINE_FAILED
    │   └── ServerUnreachable       SERVER_UNREACHABLE  (raised by clients only)
    ├── Aborted
    │   ├── AdapterEvicted          ADAPTER_EVICTED
    │   └── NonFiniteOutput         NON_FINITE_OUTPUT
    ├── DeadlineExceeded            DEADLINE_EXCEEDED
    │   └── DeadlineTooShort        DEADLINE_TOO_SHORT
    ├── AdapterCorrupt              ADAPTER_CORRUPT
    ├── Cancelled                   CANCELLED
    ├── Unimplemented               UNIMPLEMENTED
    ├── StoreLocked                 STORE_LOCKED  (start-up only, never on the wire)
    └── InternalError               INTERNAL
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

__all__ = [
    "Aborted",
    "AdapterBudgetExceeded",
    "AdapterCorrupt",
    "AdapterEvicted",
    "AdapterExists",
    "AdapterInUse",
    "AdapterInvalid",
    "AdapterNotFound",
    "AdapterPinned",
    "BaseModelMismatch",
    "Cancelled",
    "CatalogDamaged",
    "ChecksumMismatch",
    "ContextTooLong",
    "DeadlineExceeded",
    "DeadlineTooShort",
    "DiskFailed",
    "DiskFull",
    "Draining",
    "EngineFailed",
    "EtagMismatch",
    "FailedPrecondition",
    "InternalError",
    "InvalidArgument",
    "InvalidField",
    "MalformedMessage",
    "ModelLoading",
    "NonFiniteOutput",
    "PermissionDenied",
    "QueueFull",
    "QuotaExceeded",
    "RateLimitExceeded",
    "ResourceExhausted",
    "ServerUnreachable",
    "StoreLocked",
    "StoreMismatch",
    "TemplateFailed",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "VeneerError",
    "error_for_reason",
]


class VeneerError(Exception):
    """Root of the tree.

    Args:
        message: one sentence for a person; it names the fix.
        metadata: string pairs that a program may read (``ErrorInfo.metadata``),
            for example ``{"file": "adapter_config.json", "did_you_mean": "chat"}``.
            Where they would not tell two causes of one class apart, ``cause`` is a stable
            word that does.
        retry_after_s: seconds after which a retry may succeed; None if it cannot help.
        detail: more for the operator, such as a path. It is part of ``str(error)``, but
            callers get only ``message``.
    """

    code: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.message} ({self.detail})" if self.detail else self.message


class InvalidArgument(VeneerError):
    """The request is wrong whatever the server's state."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"


class InvalidField(InvalidArgument):
    """A request field has a value outside its range (metadata ``field``)."""

    reason = "INVALID_FIELD"


class AdapterInvalid(InvalidArgument):
    """An adapter's files are refused (metadata ``file``, ``tensor`` or ``key``)."""

    reason = "ADAPTER_INVALID"


class ChecksumMismatch(InvalidArgument):
    """Received bytes do not have the SHA-256 that the sender declared."""

    reason = "CHECKSUM_MISMATCH"


class ContextTooLong(InvalidArgument):
    """The prompt (plus the requested tokens) cannot fit the context or the KV pool."""

    reason = "CONTEXT_TOO_LONG"


class MalformedMessage(InvalidArgument):
    """The bytes of the request are not a message of this call (metadata ``message``)."""

    reason = "MALFORMED_MESSAGE"


class TemplateFailed(InvalidArgument):
    """The chat template could not render these messages (metadata ``cause``)."""

    reason = "TEMPLATE_FAILED"


class Unauthenticated(VeneerError):
    """The caller sent no credentials, or invalid ones."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(VeneerError):
    """The caller is known but may not do this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class AdapterNotFound(VeneerError):
    """No adapter, revision or alias has this name (metadata ``did_you_mean``)."""

    code = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class AdapterExists(VeneerError):
    """The name holds other content and ``allow_replace`` was not given."""

    code = "ALREADY_EXISTS"
    reason = "ADAPTER_EXISTS"


class FailedPrecondition(VeneerError):
    """The server's state forbids the call; change the state first."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class BaseModelMismatch(FailedPrecondition):
    """The adapter was trained on another base model."""

    reason = "BASE_MODEL_MISMATCH"


class AdapterInUse(FailedPrecondition):
    """Running requests still use the adapter."""

    reason = "ADAPTER_IN_USE"


class AdapterPinned(FailedPrecondition):
    """An operator pinned the adapter; unpin it first."""

    reason = "ADAPTER_PINNED"


class EtagMismatch(FailedPrecondition):
    """The adapter changed since it was read."""

    reason = "ETAG_MISMATCH"


class CatalogDamaged(FailedPrecondition):
    """The catalog cannot be read; ``veneer-server store recover`` rebuilds it."""

    reason = "CATALOG_DAMAGED"


class StoreMismatch(FailedPrecondition):
    """Catalog and stored adapters do not match: one is missing, empty, older or from another
    folder. Nothing was changed (start-up only; metadata ``found`` and ``fix``)."""

    reason = "STORE_MISMATCH"


class ResourceExhausted(VeneerError):
    """A budget is used up."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The waiting queue is full; retry after ``retry_after_s``."""

    reason = "QUEUE_FULL"


class AdapterBudgetExceeded(ResourceExhausted):
    """The adapter can never fit the tier's byte budget."""

    reason = "ADAPTER_BUDGET_EXCEEDED"


class QuotaExceeded(ResourceExhausted):
    """A caller's quota is used up."""

    reason = "QUOTA_EXCEEDED"


class RateLimitExceeded(ResourceExhausted):
    """The caller or its tenant is at its limit; retry after ``retry_after_s`` (metadata
    ``account``, ``limit``, ``allowed``)."""

    reason = "RATE_LIMIT_EXCEEDED"


class DiskFull(ResourceExhausted):
    """The data folder's disk is full; nothing was published."""

    reason = "DISK_FULL"


class Unavailable(VeneerError):
    """The server cannot serve now but will."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DiskFailed(Unavailable):
    """The disk of the data folder reports errors; the requested change did not happen."""

    reason = "DISK_FAILED"


class Draining(Unavailable):
    """The server is stopping and takes no new work."""

    reason = "DRAINING"


class ModelLoading(Unavailable):
    """The base model is still loading."""

    reason = "MODEL_LOADING"


class EngineFailed(Unavailable):
    """The engine process ended; it is being restarted."""

    reason = "ENGINE_FAILED"


class ServerUnreachable(Unavailable):
    """No Veneer server answers at this address (raised by clients)."""

    reason = "SERVER_UNREACHABLE"


class Aborted(VeneerError):
    """The server ended the request (metadata ``cause``)."""

    code = "ABORTED"
    reason = "ABORTED"


class AdapterEvicted(Aborted):
    """The adapter was evicted with mode ABORT."""

    reason = "ADAPTER_EVICTED"


class NonFiniteOutput(Aborted):
    """This sequence's logits were NaN or infinite; the rest of the batch is unaffected."""

    reason = "NON_FINITE_OUTPUT"


class DeadlineExceeded(VeneerError):
    """The call's deadline passed."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class DeadlineTooShort(DeadlineExceeded):
    """The deadline cannot be met; refused before any work."""

    reason = "DEADLINE_TOO_SHORT"


class AdapterCorrupt(VeneerError):
    """Stored content no longer matches its digest; push the adapter again."""

    code = "DATA_LOSS"
    reason = "ADAPTER_CORRUPT"


class Cancelled(VeneerError):
    """The caller cancelled the request."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Unimplemented(VeneerError):
    """The call needs a part of the contract that this version does not serve yet."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class StoreLocked(VeneerError):
    """Another process owns the data folder (start-up only)."""

    code = "FAILED_PRECONDITION"
    reason = "STORE_LOCKED"


class InternalError(VeneerError):
    """A bug in Veneer: please report it with the request id."""

    code = "INTERNAL"
    reason = "INTERNAL"


def _tree(cls: type[VeneerError]) -> Iterator[type[VeneerError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def error_for_reason(reason: str) -> type[VeneerError]:
    """The class with this ``ErrorInfo`` reason; `VeneerError` for unknown ones."""
    for cls in _tree(VeneerError):
        if cls.reason == reason:
            return cls
    return VeneerError
