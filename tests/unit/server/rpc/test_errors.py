"""Each error of the tree has a status with the details that the contract requires."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import grpc
import pytest
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from veneer_registry import errors
from veneer_registry.errors import VeneerError, error_for_reason
from veneer_server.errors import DOMAIN, internal_error
from veneer_server.rpc.status import to_grpc_status

DETAIL = {
    "INVALID_ARGUMENT": "BadRequest",
    "NOT_FOUND": "ResourceInfo",
    "FAILED_PRECONDITION": "PreconditionFailure",
    "UNAVAILABLE": "RetryInfo",
}
QUOTA = {"ADAPTER_BUDGET_EXCEEDED", "QUOTA_EXCEEDED", "RATE_LIMIT_EXCEEDED", "DISK_FULL"}


def tree(cls: type[VeneerError]) -> Iterator[type[VeneerError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from tree(sub)


OURS = [cls for cls in tree(VeneerError) if cls.__module__ == errors.__name__]


def unpack(error: VeneerError) -> tuple[grpc.StatusCode, status_pb2.Status, dict[str, object]]:
    code, message, trailing = to_grpc_status(error)
    metadata = dict(trailing)
    binary = metadata.pop("grpc-status-details-bin")
    assert isinstance(binary, bytes)
    status = status_pb2.Status.FromString(binary)
    assert (status.code, status.message) == (code.value[0], message)
    return code, status, metadata


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_code_reason_and_detail(cls: type[VeneerError]) -> None:
    code, status, _ = unpack(cls("do this", metadata={"adapter": "x"}))
    kinds = [detail.TypeName().removeprefix("google.rpc.") for detail in status.details]
    assert code.name == cls.code
    assert kinds[0] == "ErrorInfo"
    info = ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == (
        DOMAIN,
        cls.reason,
        {"adapter": "x"},
    )
    assert error_for_reason(info.reason) is cls
    if cls.code in DETAIL and cls is not errors.StoreLocked:
        assert DETAIL[cls.code] in kinds
    assert ("QuotaFailure" in kinds) == (cls.reason in QUOTA)


def test_retry_is_told_twice() -> None:
    _, status, metadata = unpack(errors.QueueFull("full", retry_after_s=0.25))
    assert metadata == {"grpc-retry-pushback-ms": "250"}
    assert "google.rpc.RetryInfo" in [detail.TypeName() for detail in status.details]


def test_no_retry_where_it_cannot_help() -> None:
    _, status, metadata = unpack(errors.AdapterBudgetExceeded("too large"))
    assert metadata == {}
    assert "google.rpc.RetryInfo" not in [detail.TypeName() for detail in status.details]


def test_a_long_error_fits_the_clients_metadata_limit() -> None:
    long = {f"key{n}": "日" * 5000 for n in range(50)}
    error = errors.AdapterInvalid("日" * 10_000, metadata=long)
    _, message, trailing = to_grpc_status(error)
    # gRPC sends binary metadata in base64 and the message percent-encoded.
    binary = sum(len(value) for _, value in trailing) * 4 / 3
    assert binary + len(quote(message)) < 8 << 10


def test_internal_errors_name_the_request_only() -> None:
    error = internal_error("abc")
    assert error.metadata == {"request_id": "abc"}
    assert "abc" in error.message
