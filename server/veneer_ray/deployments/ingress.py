"""The ingress: it listens on the cluster's ports, and Serve tells it which engines run."""

from __future__ import annotations

import asyncio
from typing import Any

import ray.util
from ray.serve.handle import DeploymentHandle

from veneer_ray.ingress_server import IngressServer
from veneer_ray.ray_api import watch_engines
from veneer_ray.replicas import EngineReplicas
from veneer_ray.settings import RayCluster


class Ingress:
    """The ingress's deployment. Calls do not pass Serve, only commands of ``veneer-ray`` do."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, in the loop of all other methods
        self, settings: str, engines: DeploymentHandle, registry: DeploymentHandle
    ) -> None:
        self._server: IngressServer | None = None
        self._cluster = RayCluster.of_text(settings)
        self._registry = registry  # makes it a part of the application
        replicas = EngineReplicas(self._cluster.wait_s)
        loop = asyncio.get_running_loop()
        watch_engines(lambda running: loop.call_soon_threadsafe(replicas.update, running))
        server = IngressServer(self._cluster, replicas)
        await server.start()
        self._server = server
        # Serve tells of the engines from the first call on.
        self._told = asyncio.ensure_future(engines.ping.remote())

    async def settings(self) -> str:
        """The cluster's settings as text, for ``veneer-ray scale``."""
        return self._cluster.as_text()

    async def not_ready(self) -> str:
        """Why the ports or the engines behind them do not answer; "" if they do."""
        return "it stops" if self._server is None else await self._server.not_ready()

    async def machine(self) -> str:
        """Address of the machine whose ports these are."""
        return str(ray.util.get_node_ip_address())

    def __del__(self) -> Any:
        # Serve calls it once, in the loop, and awaits what it returns. Python calls it too.
        server, self._server = getattr(self, "_server", None), None
        return None if server is None else server.stop()
