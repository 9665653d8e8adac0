"""The standard health service, following the server's phase and the engine's heartbeat."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

__all__ = ["SERVICES", "Health"]

SERVICES: Final = (
    "veneer.v1.InferenceService",
    "veneer.v1.AdapterService",
    "veneer.v1.ServerService",
    "veneer.v1.ReplicationService",
)
"""Services that report their own readiness."""

_ENGINE_SERVICE: Final = SERVICES[0]
_UP: Final = health_pb2.HealthCheckResponse.SERVING
_DOWN: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Liveness under ``""``, readiness under each service's name.

    Liveness says that the front process answers and is not stopping: restarting it
    would not help a loading or restarting engine. InferenceService is ready while
    the engine's step loop answers; the other services once loading is done. A server without
    an engine does not have InferenceService, so that a check of it gets NOT_FOUND: this tells a
    registry, which is ready, from a server whose engine is away, and needs no credentials.
    """

    def __init__(self, *, generates: bool = True) -> None:
        """Args: generates: whether the server has an engine."""
        # grpc_health ships no types for its asyncio servicer.
        self._servicer: Any = health.aio.HealthServicer()
        self._services = SERVICES if generates else SERVICES[1:]
        self._loaded = False
        self._engine = False
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def add_to(self, server: Any) -> None:
        """Register with a server that has not started."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self._publish()

    async def loaded(self) -> None:
        """Record that the server has finished loading."""
        self._loaded = True
        await self._publish()

    def engine_changed(self, healthy: bool) -> None:
        """Called back by `EngineClient` when the engine's heartbeat starts or stops."""
        self._engine = healthy
        task = asyncio.get_running_loop().create_task(self._publish())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Report NOT_SERVING for every service from now on."""
        self._draining = True
        await self._publish()

    async def _publish(self) -> None:
        ready = self._loaded and not self._draining
        await self._servicer.set("", _DOWN if self._draining else _UP)
        for service in self._services:
            up = ready and (self._engine or service != _ENGINE_SERVICE)
            await self._servicer.set(service, _UP if up else _DOWN)
