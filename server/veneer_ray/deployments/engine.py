"""An engine replica: it runs a server that follows the registry. The ingress calls that server
directly; Serve starts, checks, scales and drains it through this class."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import aiohttp
import grpc
import ray.util
from prometheus_client.parser import text_string_to_metric_families
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2

from veneer_ray.deployments.health import end_replica, require_healthy
from veneer_ray.deployments.server_process import ReplicaFolder, ServerProcess
from veneer_ray.scaling import KV, WAITING
from veneer_ray.settings import RayCluster

_STATS_S: Final = 2.0
_MOST_LISTED: Final = 1000
_RUNNING: Final = "veneer_num_requests_running"
_WAITING: Final = "veneer_num_requests_waiting"
_KV: Final = "veneer_kv_cache_usage_ratio"


class Engine:
    """The engine's deployment. A removed replica gets no new calls, and is stopped once its
    running calls have ended."""

    def __init__(self, settings: str) -> None:
        cluster = RayCluster.of_text(settings)
        folder = ReplicaFolder(cluster.data_dir / "engines")
        self._folder = folder
        self._drain_s = cluster.drain_s
        host = cluster.engine_host(ray.util.get_node_ip_address())
        self._server = ServerProcess(
            lambda ports: cluster.engine_flags(folder.path, ports, host), end_replica
        )
        self._operator: tuple[tuple[str, str], ...] = ()
        if cluster.key_file is not None:
            key = cluster.key_file.read_text("utf-8").strip()
            self._operator = (("authorization", f"Bearer {key}"),)
        self._opened: grpc.aio.Channel | None = None
        self._web: aiohttp.ClientSession | None = None

    async def ping(self) -> None:
        """Does nothing: with its first call, an ingress makes Serve tell it of the engines."""

    def record_replica_metadata(self) -> dict[str, str]:
        """Where the server listens; Serve asks once, and tells the ingresses."""
        return {"grpc": self._server.grpc, "http": self._server.openai}

    async def check_health(self) -> None:
        """Raises if the engine's step loop does not answer."""
        await require_healthy(self._channel, "veneer.v1.InferenceService")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Statistics for the ingresses: digests in memory, number of running and waiting
        requests, whether the engine is healthy, and the time."""
        at = time.time()
        try:
            async with asyncio.timeout(_STATS_S):
                await self.check_health()
                load = await self._load()
                resident = await self._resident()
        except (RuntimeError, OSError, TimeoutError, grpc.aio.AioRpcError, aiohttp.ClientError):
            return {"at": at, "healthy": False}
        requests = int(load[_RUNNING] + load[_WAITING])
        return {"at": at, "healthy": True, "requests": requests, "resident": sorted(resident)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Statistics for `scaling.policy`."""
        load = await self._load()
        return {WAITING: load[_WAITING], KV: load[_KV]}

    async def _resident(self) -> set[str]:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        found: set[str] = set()
        for tier in (inference_pb2.TIER_DEVICE, inference_pb2.TIER_HOST):
            asked = adapters_pb2.ListAdaptersRequest(page_size=_MOST_LISTED, tier=tier)
            page = await stub.ListAdapters(asked, metadata=self._operator)
            found.update(each.weights_digest for each in page.adapters)
        return found

    async def _load(self) -> dict[str, float]:
        """The server's metrics of its load."""
        found = dict.fromkeys((_RUNNING, _WAITING, _KV), 0.0)
        address = f"http://{self._server.metrics}/metrics"
        async with self._session.get(address, headers=dict(self._operator)) as answer:
            page = await answer.text()
        for family in text_string_to_metric_families(page):
            if family.name in found:
                found[family.name] = sum(sample.value for sample in family.samples)
        return found

    def __del__(self) -> None:
        # Serve calls it once the ingresses have been told that the replica goes.
        if (server := getattr(self, "_server", None)) is not None:  # it may not have started
            server.stop(self._drain_s + 30.0)

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._opened is None:  # in the loop that uses it
            self._opened = grpc.aio.insecure_channel(
                self._server.grpc, options=(("grpc.max_receive_message_length", -1),)
            )
        return self._opened

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._web is None:
            self._web = aiohttp.ClientSession()
        return self._web
