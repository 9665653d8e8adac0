"""Statuses that FAKE servers end calls with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    """A status; without a reason it has no details, like one from a proxy."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_s: float | None = None
    domain: str = "veneer"

    def end(self, context: grpc.ServicerContext) -> NoReturn:
        if self.reason:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            details: list[Any] = [
                error_details_pb2.ErrorInfo(
                    reason=self.reason, domain=self.domain, metadata=self.metadata
                )
            ]
            if self.retry_s is not None:
                delay = Duration()
                delay.FromNanoseconds(int(self.retry_s * 1e9))
                details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            for detail in details:
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            context.set_trailing_metadata(
                (("grpc-status-details-bin", status.SerializeToString()),)
            )
        context.abort(self.code, self.message)
        raise AssertionError("abort raises")
