"""An engine replica: it runs a server that follows the registry, and forwards calls to it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp
import grpc
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2

from veneer_ray.calls import CallEnded, Head, HttpCall, Metadata, RayCall, Started, lost
from veneer_ray.deployments.health import end_replica, require_healthy
from veneer_ray.deployments.server_process import ReplicaFolder, ServerProcess
from veneer_ray.scaling import KV, WAITING
from veneer_ray.settings import RayCluster

_STATS_S: Final = 2.0
_MOST_LISTED: Final = 1000
_HOPS: Final = frozenset(
    (
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "upgrade",
        "proxy-authenticate",
        "proxy-authorization",
        "transfer-encoding",
    )
)
"""Headers that apply to one connection and are not forwarded (RFC 9110, 7.6.1)."""

Answer = AsyncIterator[Started | Head | bytes | CallEnded]


class Engine:
    """The engine's deployment: Serve calls `call` and `http` for an ingress. A removed replica
    gets no new calls, and is stopped once its running calls have ended."""

    def __init__(self, settings: str) -> None:
        cluster = RayCluster.of_text(settings)
        folder = ReplicaFolder(cluster.data_dir / "engines")
        self._folder = folder
        self._id = serve.get_replica_context().replica_id.unique_id
        self._server = ServerProcess(
            lambda ports: cluster.engine_flags(folder.path, ports), end_replica
        )
        self._operator: Metadata = ()
        if cluster.key_file is not None:
            key = cluster.key_file.read_text("utf-8").strip()
            self._operator = (("authorization", f"Bearer {key}"),)
        self._opened: grpc.aio.Channel | None = None
        self._web: aiohttp.ClientSession | None = None
        self._calls = 0

    # ------------------------------------------------------------------ calls

    async def call(self, call: RayCall) -> Answer:
        """Forward a gRPC call; yield `Started`, messages, `CallEnded`."""
        yield Started(self._id)
        self._calls += 1
        made: Any = None
        opened: Any = self._channel
        try:
            if call.streams:
                made = opened.unary_stream(call.path)(call.request, metadata=call.metadata)
                async for message in made:
                    yield message
            else:
                made = opened.unary_unary(call.path)(call.request, metadata=call.metadata)
                yield await made
            yield CallEnded.well(await made.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            yield CallEnded.failed(error)
        finally:
            self._calls -= 1
            if made is not None:
                made.cancel()

    async def http(self, call: HttpCall) -> Answer:
        """Forward an HTTP request; yield `Started`, `Head`, the body in parts, `CallEnded`."""
        yield Started(self._id)
        self._calls += 1
        try:
            async with self._session.request(
                call.method,
                f"http://{self._server.openai}{call.target}",
                headers=[each for each in call.headers if each[0].lower() not in _HOPS],
                data=call.body,
                allow_redirects=False,
            ) as answer:
                kept = [each for each in answer.headers.items() if each[0].lower() not in _HOPS]
                yield Head(answer.status, tuple(kept))
                async for part in answer.content.iter_any():
                    yield part
            yield CallEnded()
        except aiohttp.ClientError:
            yield CallEnded.by(lost("the server handling this request has stopped"))
        finally:
            self._calls -= 1

    # ------------------------------------------------------------------ what Serve asks

    async def check_health(self) -> None:
        """Raises if the engine's step loop does not answer."""
        await require_healthy(self._channel, "veneer.v1.InferenceService")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Statistics for routers: digests in memory, number of running calls, and the time."""
        at, requests = time.time(), self._calls
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        resident: set[str] = set()
        for tier in (inference_pb2.TIER_DEVICE, inference_pb2.TIER_HOST):
            asked = adapters_pb2.ListAdaptersRequest(page_size=_MOST_LISTED, tier=tier)
            page = await stub.ListAdapters(asked, metadata=self._operator, timeout=_STATS_S)
            resident.update(each.weights_digest for each in page.adapters)
        return {"at": at, "requests": requests, "resident": sorted(resident)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Statistics for `scaling.policy`."""
        found = {"veneer_num_requests_waiting": 0.0, "veneer_kv_cache_usage_ratio": 0.0}
        address = f"http://{self._server.metrics}/metrics"
        async with self._session.get(address) as answer:
            page = await answer.text()
        for family in text_string_to_metric_families(page):
            if family.name in found:
                found[family.name] = sum(sample.value for sample in family.samples)
        waiting, kv = found.values()
        return {WAITING: waiting, KV: kv}

    def __del__(self) -> None:
        # Serve calls it once the replica has no calls.
        if (server := getattr(self, "_server", None)) is not None:  # it may not have started
            server.stop(30.0)

    # ------------------------------------------------------------------ connections

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
            self._web = aiohttp.ClientSession(
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0),
            )
        return self._web
