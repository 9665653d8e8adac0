"""Health of a server, and the end of a replica whose server has ended."""

from __future__ import annotations

import os
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_server.logs import get_logger

_ANSWER_S: Final = 5.0

_log = get_logger(__name__)


async def require_healthy(channel: grpc.aio.Channel, service: str) -> None:
    """Raises RuntimeError unless a server's service is ready. Of the InferenceService the
    engine's step loop says so, by its heartbeat."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = await stub.Check(request, timeout=_ANSWER_S)
    except grpc.aio.AioRpcError as error:
        raise RuntimeError(f"{service} does not answer: {error.code().name}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"{service} is not ready")


def end_replica(code: int) -> None:
    """The server has ended by itself: end at once, so that Serve starts another replica now and
    not after some failed health checks."""
    _log.error("the server of this replica has exited", status=code)
    os._exit(1)
