"""ServerService: what the server is."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from veneer_proto.v1 import server_pb2, server_pb2_grpc
from veneer_registry.adapter import BaseSpec
from veneer_registry.errors import Unimplemented
from veneer_registry.registry import Registry

from veneer_server import __version__
from veneer_server.config import ServerConfig
from veneer_server.engine.client import EngineClient
from veneer_server.metrics import Metrics
from veneer_server.rpc import convert

__all__ = ["ServerService"]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Facts for operators and clients."""

    def __init__(
        self,
        config: ServerConfig,
        base: BaseSpec,
        registry: Registry,
        engine: EngineClient,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._base = base
        self._registry = registry
        self._engine = engine
        self._metrics = metrics
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Any
    ) -> server_pb2.GetServerInfoResponse:
        """Version, base model, budgets, counts."""
        config, info, base = self._config, self._engine.info, self._base
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
            ),
            device=info.device,
            backend=info.backend,
            budgets=server_pb2.Budgets(
                host_adapter_bytes=config.host_cache_bytes,
                device_adapter_bytes=config.device_adapter_bytes,
                kv_cache_bytes=config.kv_cache_bytes,
                kv_cache_tokens=info.kv_cache_tokens,
                max_batch_tokens=config.max_batch_tokens,
                max_running=config.max_running,
                max_queue=config.max_queue,
            ),
            context_length=info.context_length,
            uptime=convert.duration(time.monotonic() - self._started),
            adapters_registered=len(self._registry),
            adapters_on_device=self._metrics.on_device,
            engine_starts=self._engine.starts,
        )

    async def PlanCapacity(self, request: Any, context: Any) -> NoReturn:
        raise Unimplemented(
            "PlanCapacity comes with a later version: see GetServerInfo for budgets",
            metadata={"rpc": "PlanCapacity"},
        )
