"""Checks a server's health, and ends a replica whose server has exited."""

from __future__ import annotations

import os
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_server.logs import get_logger

_ANSWER_S: Final = 5.0

_log = get_logger(__name__)


async def require_healthy(channel: grpc.aio.Channel, service: str) -> None:
    """Raise RuntimeError unless a server's service is ready. The InferenceService is ready
    while the engine's step loop sends its heartbeat."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = await stub.Check(request, timeout=_ANSWER_S)
    except grpc.aio.AioRpcError as error:
        raise RuntimeError(f"{service} does not answer: {error.code().name}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"{service} is not ready")


def end_replica(code: int) -> None:
    """Exit at once because the server has exited by itself, so that Serve starts another
    replica now and not after several failed health checks."""
    _log.error("the server of this replica has exited", status=code)
    os._exit(1)
