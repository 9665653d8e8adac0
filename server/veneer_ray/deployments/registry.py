"""The registry's deployment: one server that the engines follow."""

from __future__ import annotations

import grpc

from veneer_ray.deployments.health import end_replica, require_healthy
from veneer_ray.deployments.server_process import ServerProcess
from veneer_ray.settings import RayCluster


class Registry:
    """One replica. Engines and ingresses call its server, not this class."""

    def __init__(self, settings: str) -> None:
        cluster = RayCluster.of_text(settings)
        self._server = ServerProcess(cluster.registry_flags, end_replica)
        self._channel: grpc.aio.Channel | None = None

    async def check_health(self) -> None:
        """Called by Serve. Raises if the server does not answer."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._server.grpc)
        await require_healthy(self._channel, "veneer.v1.AdapterService")

    def __del__(self) -> None:
        # Serve calls it once the replica has no calls.
        if (server := getattr(self, "_server", None)) is not None:  # it may not have started
            server.stop(30.0)
