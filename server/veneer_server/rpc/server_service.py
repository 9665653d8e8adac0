"""ServerService: server facts, memory use and capacity planning."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from veneer_proto.v1 import server_pb2, server_pb2_grpc
from veneer_registry.adapter import PROJECTIONS, BaseSpec
from veneer_registry.errors import InvalidField

from veneer_server import __version__
from veneer_server.access.caller import Caller
from veneer_server.access.principal import DEFAULT_TENANT, denied
from veneer_server.config import ServerConfig
from veneer_server.engine_client.client import EngineClient
from veneer_server.quotas.usage import UsageBook
from veneer_server.rpc import convert
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.tenants import Tenants
from veneer_server.serving.visible import Visible
from veneer_server.sizing.capacity import Budgets, Capacity, Limit, plan_capacity
from veneer_server.sizing.memory_plan import BLOCK_TOKENS
from veneer_server.system.machine import peak_bytes
from veneer_server.text.defaults import RequestDefaults
from veneer_server.wire.sampling import OF_BASE

MAX_RANK: Final = 4096
_DEFAULT_RANK: Final = 16

_LIMITS: Final = {
    Limit.DEVICE_ADAPTERS: server_pb2.LIMIT_DEVICE_ADAPTERS,
    Limit.HOST_ADAPTERS: server_pb2.LIMIT_HOST_ADAPTERS,
    Limit.KV_CACHE: server_pb2.LIMIT_KV_CACHE,
    Limit.MAX_RUNNING: server_pb2.LIMIT_MAX_RUNNING,
}


@dataclass(frozen=True, slots=True)
class ReplicationFacts:
    """A server's role, and its state as a follower or a registry.

    Attributes:
        registry: address of a follower's registry; else "".
        lag_s: seconds since a follower's view was known to be current.
        sequence: a follower's last applied change; a registry's last change.
        followers: number of a registry's followers.
    """

    role: str = "all"
    registry: str = ""
    connected: bool = True
    lag_s: float = 0.0
    sequence: int = 0
    followers: int = 0


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Facts for operators and clients."""

    def __init__(
        self,
        config: ServerConfig,
        base: BaseSpec,
        tenants: Tenants,
        engine: EngineClient,
        budgets: AdapterBudgets,
        defaults: RequestDefaults,
        book: UsageBook,
        replication: Callable[[], ReplicationFacts] = ReplicationFacts,
    ) -> None:
        self._book = book
        self._replication = replication
        self._config = config
        self._base = base
        self._tenants = tenants
        self._visible = Visible(tenants)
        self._engine = engine
        self._budgets = budgets
        self._defaults = defaults
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Any
    ) -> server_pb2.GetServerInfoResponse:
        """Version, base model, budgets, counts, memory."""
        config, info, base = self._config, self._engine.info, self._base
        caller: Caller = context.caller
        tenant = self._tenants.named(caller.tenant)
        facts = self._replication()
        # It would tell other tenants when somebody publishes.
        trusted = caller.tenant == DEFAULT_TENANT and caller.principal.has({"operator"})
        sequence = facts.sequence if trusted else 0
        return server_pb2.GetServerInfoResponse(
            version=__version__,
            base_model=server_pb2.BaseModel(
                name=base.name,
                architecture=info.architecture,
                quantization=config.quantization,
                dtype=config.dtype,
                parameters=info.parameters,
                bytes=info.weights_bytes,
                fingerprint=server_pb2.BaseFingerprint(
                    weights=base.fingerprint.weights,
                    tokenizer=base.fingerprint.tokenizer,
                    quantization=base.fingerprint.quantization,
                    template=base.fingerprint.template,
                ),
                shape=server_pb2.BaseShape(
                    layers=base.num_layers,
                    vocabulary=info.vocab_size,
                    projections=[
                        server_pb2.ProjectionShape(
                            name=name, in_features=inputs, out_features=outputs
                        )
                        for name, (outputs, inputs) in base.shapes.items()
                    ],
                ),
            ),
            device=info.device,
            backend=info.backend,
            why_not_native=info.why_not_native,
            threads=info.threads,
            why_threads=info.why_threads,
            admin_port=config.admin_listen is not None,
            role=facts.role,
            replication=server_pb2.Replication(
                registry=facts.registry,
                connected=facts.connected,
                lag=convert.duration(facts.lag_s),
                sequence=sequence,
                followers=facts.followers,
            ),
            budgets=server_pb2.Budgets(
                host_adapter_bytes=self._budgets.host,
                device_adapter_bytes=self._budgets.device,
                kv_cache_bytes=self._budgets.memory.kv_cache_bytes,
                kv_cache_tokens=info.kv_cache_tokens,
                max_batch_tokens=info.max_batch_tokens,
                max_prefill_tokens=info.max_prefill_tokens,
                max_running=config.max_running,
                max_queue=config.max_queue,
            ),
            context_length=info.context_length,
            uptime=convert.duration(time.monotonic() - self._started),
            adapters_registered=0 if tenant is None else len(tenant.registry),
            adapters_on_device=0 if tenant is None else tenant.events.on_device,
            engine_starts=self._engine.starts,
            memory=self._memory_used(),
            longest_step=convert.duration(info.longest_step_seconds),
            defaults=server_pb2.RequestDefaults(
                max_tokens=self._defaults.most_tokens(),
                **{name: getattr(self._defaults.sampling, name) for name in OF_BASE},
            ),
        )

    def _memory_used(self) -> server_pb2.Memory:
        engine = self._engine.pid
        return server_pb2.Memory(
            pools=[
                server_pb2.MemoryPool(
                    name=pool.name,
                    uses=[
                        server_pb2.MemoryUse(name=use.name, bytes=use.bytes)
                        for use in pool.uses
                    ],
                    total_bytes=pool.total,
                    limit_bytes=pool.limit,
                )
                for pool in self._budgets.memory.pools
            ],
            front_peak_bytes=peak_bytes("self"),
            engine_peak_bytes=0 if engine is None else peak_bytes(engine),
        )

    async def GetUsage(
        self, request: server_pb2.GetUsageRequest, context: Any
    ) -> server_pb2.GetUsageResponse:
        """Report the caller's tenant's usage. An operator may ask for any tenant, or for
        all."""
        caller: Caller = context.caller
        principal, wanted = caller.principal, request.tenant
        operator = principal.has({"operator"})
        if not operator and wanted not in ("", principal.tenant):
            raise denied({"operator"}, principal, "another tenant's usage", "GetUsage")
        report = await self._book.report(
            wanted or (None if operator and not principal.visiting else principal.tenant),
            convert.unix_seconds(request.start, "start") if request.HasField("start") else None,
            convert.unix_seconds(request.end, "end") if request.HasField("end") else None,
        )
        return server_pb2.GetUsageResponse(
            tenants=[
                server_pb2.TenantUsage(tenant=tenant, **asdict(counts))
                for tenant, counts in sorted(report.counts.items())
            ],
            start=convert.timestamp(report.start),
            end=convert.timestamp(report.end),
        )

    async def PlanCapacity(
        self, request: server_pb2.PlanCapacityRequest, context: Any
    ) -> server_pb2.PlanCapacityResponse:
        """Compute what fits into the budgets, without loading anything."""
        info, config = self._engine.info, self._config
        length = request.context_length or info.longest_sequence
        if length > info.context_length:
            raise InvalidField(
                f"context_length is {length}: {self._base.name} supports at most "
                f"{info.context_length} tokens",
                metadata={"field": "context_length"},
            )
        parameters = await self._parameters(request, context.caller)
        budgets = Budgets(
            host_adapters=self._budgets.host,
            device_adapters=self._budgets.device,
            itemsize=info.adapter_itemsize,
            kv_bytes=self._budgets.memory.kv_cache_bytes,
            kv_tokens=info.kv_cache_tokens,
            kv_token_bytes=self._budgets.memory.kv_token_bytes,
            block_tokens=BLOCK_TOKENS,
            window_blocks=info.window_blocks,
            max_running=config.max_running,
        )
        capacity = plan_capacity(
            budgets,
            adapter_parameters=parameters,
            adapters=request.adapters,
            context_length=length,
            concurrency=request.concurrency,
        )
        return _response(capacity, parameters, length)

    async def _parameters(self, request: server_pb2.PlanCapacityRequest, caller: Caller) -> int:
        """Parameters in all A and B matrices of the adapter that the request describes."""
        if request.WhichOneof("adapter") == "like":
            home = await self._tenants.current(caller)
            record = (await to_the_end(lambda: self._visible.get(home, request.like))).record
            return record.manifest.parameters
        rank = request.shape.rank if request.HasField("shape") else _DEFAULT_RANK
        if not 1 <= rank <= MAX_RANK:
            raise InvalidField(
                f"shape.rank is {rank}: give 1 to {MAX_RANK}", metadata={"field": "shape.rank"}
            )
        known = {str(projection): projection for projection in PROJECTIONS}
        for at, module in enumerate(request.shape.modules):
            if module not in known:
                raise InvalidField(
                    f"shape.modules[{at}] is {module!r}: choose from {', '.join(known)}",
                    metadata={"field": f"shape.modules[{at}]"},
                )
        modules = set(request.shape.modules) or set(known)
        shapes = self._base.shapes
        return self._base.num_layers * rank * sum(sum(shapes[known[m]]) for m in modules)


def _response(
    capacity: Capacity, parameters: int, length: int
) -> server_pb2.PlanCapacityResponse:
    return server_pb2.PlanCapacityResponse(
        adapters=server_pb2.AdapterCapacity(
            parameters=parameters,
            bytes=capacity.adapter_bytes,
            on_device=capacity.on_device,
            on_host=capacity.on_host,
        ),
        sequences=server_pb2.SequenceCapacity(
            context_length=length,
            bytes=capacity.sequence_bytes,
            running=capacity.running,
            limited_by=_LIMITS[capacity.limited_by],
        ),
        fits=not capacity.shortfalls,
        shortfalls=[
            server_pb2.Shortfall(
                limit=_LIMITS[short.limit],
                flag=short.limit.value,
                needed=short.needed,
                available=short.available,
                message=short.message,
            )
            for short in capacity.shortfalls
        ],
    )


# -------------------- health
# The standard health service, following the server's phase and the engine's heartbeat.

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
    an engine does not have InferenceService, so that a check of it gets NOT_FOUND. That tells a
    ready registry from a server whose engine is down, and needs no credentials.
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
