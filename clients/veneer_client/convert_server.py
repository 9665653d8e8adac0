"""Converts protobuf messages about the server, budgets and self-test to records."""

from __future__ import annotations

from datetime import UTC
from typing import Final

from grpc_health.v1 import health_pb2
from veneer_proto.v1 import adapters_pb2, server_pb2
from veneer_registry.adapter import BaseFingerprint

from veneer_client.convert import same_names, seconds
from veneer_client.server_records import (
    AdapterCapacity,
    BaseModel,
    BaseShape,
    Budgets,
    BudgetUse,
    Capacity,
    Limit,
    Memory,
    MemoryPool,
    SelfTest,
    SelfTestResult,
    SequenceCapacity,
    ServerInfo,
    ServingStatus,
    Shortfall,
    TenantUsage,
    UsageReport,
)
from veneer_client.types import RequestDefaults

__all__ = ["budget_use", "capacity", "self_test", "server_info", "serving_status", "usage"]

_STATUS: Final = {
    health_pb2.HealthCheckResponse.SERVING: ServingStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: ServingStatus.NOT_SERVING,
}
_LIMITS: Final = {
    server_pb2.LIMIT_DEVICE_ADAPTERS: Limit.DEVICE_ADAPTERS,
    server_pb2.LIMIT_HOST_ADAPTERS: Limit.HOST_ADAPTERS,
    server_pb2.LIMIT_KV_CACHE: Limit.KV_CACHE,
    server_pb2.LIMIT_MAX_RUNNING: Limit.MAX_RUNNING,
}


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """Description of the server."""
    base = message.base_model
    return same_names(
        ServerInfo,
        message,
        base_model=same_names(
            BaseModel,
            base,
            size=base.bytes,
            fingerprint=same_names(BaseFingerprint, base.fingerprint),
            shape=_base_shape(base.shape) if base.HasField("shape") else None,
        ),
        budgets=same_names(Budgets, message.budgets),
        uptime_s=seconds(message.uptime),
        memory=Memory(
            pools=tuple(
                MemoryPool(
                    name=pool.name,
                    uses={use.name: use.bytes for use in pool.uses},
                    total=pool.total_bytes,
                    limit=pool.limit_bytes,
                )
                for pool in message.memory.pools
            ),
            front_peak=message.memory.front_peak_bytes,
            engine_peak=message.memory.engine_peak_bytes,
        ),
        longest_step_s=seconds(message.longest_step),
        threads=message.threads,
        why_threads=message.why_threads,
        admin_port=message.admin_port,
        defaults=same_names(RequestDefaults, message.defaults)
        if message.HasField("defaults")
        else None,
    )


def _base_shape(message: server_pb2.BaseShape) -> BaseShape:
    return BaseShape(
        layers=message.layers,
        vocabulary=message.vocabulary,
        projections={p.name: (p.out_features, p.in_features) for p in message.projections},
    )


def serving_status(message: health_pb2.HealthCheckResponse) -> ServingStatus:
    """Answer of the health service."""
    return _STATUS.get(message.status, ServingStatus.UNKNOWN)


def capacity(message: server_pb2.PlanCapacityResponse) -> Capacity:
    """How much would fit."""
    adapters, sequences = message.adapters, message.sequences
    return Capacity(
        adapters=AdapterCapacity(
            parameters=adapters.parameters,
            size=adapters.bytes,
            on_device=adapters.on_device,
            on_host=adapters.on_host,
        ),
        sequences=SequenceCapacity(
            context_length=sequences.context_length,
            size=sequences.bytes,
            running=sequences.running,
            limited_by=_LIMITS.get(sequences.limited_by, Limit.NONE),
        ),
        fits=message.fits,
        shortfalls=tuple(
            same_names(Shortfall, short, limit=_LIMITS.get(short.limit, Limit.NONE))
            for short in message.shortfalls
        ),
    )


def budget_use(message: adapters_pb2.UpdateBudgetsResponse) -> BudgetUse:
    """The current budgets and their use."""
    return same_names(BudgetUse, message)


def self_test(message: adapters_pb2.SelfTestResponse) -> SelfTest:
    """Outcome of a self-test."""
    return same_names(
        SelfTest,
        message,
        results=tuple(same_names(SelfTestResult, result) for result in message.results),
    )


def usage(message: server_pb2.GetUsageResponse) -> UsageReport:
    """Usage by tenant."""
    return UsageReport(
        start=message.start.ToDatetime(UTC),
        end=message.end.ToDatetime(UTC),
        tenants=tuple(same_names(TenantUsage, tenant) for tenant in message.tenants),
    )
