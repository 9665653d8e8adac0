"""Protobuf of the admin services to records and back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2
from veneer_proto.v1 import adapters_pb2, server_pb2
from veneer_registry.adapter import BaseFingerprint, Tier

from veneer_client.convert import TIER_OF, seconds
from veneer_client.records import (
    AdapterCapacity,
    AdapterDetails,
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    BaseModel,
    Budgets,
    Capacity,
    Eviction,
    EvictMode,
    Limit,
    Memory,
    MemoryPool,
    SequenceCapacity,
    ServerInfo,
    ServingStatus,
    Shortfall,
)

__all__ = [
    "EVICT_MODES",
    "adapter_details",
    "adapter_event",
    "adapter_info",
    "capacity",
    "eviction",
    "server_info",
    "serving_status",
]

EVICT_MODES: Final = {
    EvictMode.DRAIN: adapters_pb2.EVICT_MODE_DRAIN,
    EvictMode.FAIL_IF_BUSY: adapters_pb2.EVICT_MODE_FAIL_IF_BUSY,
    EvictMode.ABORT: adapters_pb2.EVICT_MODE_ABORT,
}
_STATUS: Final = {
    health_pb2.HealthCheckResponse.SERVING: ServingStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: ServingStatus.NOT_SERVING,
}
_KINDS: Final = {
    getattr(adapters_pb2, f"ADAPTER_EVENT_{kind.name}"): kind
    for kind in AdapterEventKind
    if kind is not AdapterEventKind.UNKNOWN
}
_LIMITS: Final = {
    server_pb2.LIMIT_DEVICE_ADAPTERS: Limit.DEVICE_ADAPTERS,
    server_pb2.LIMIT_HOST_ADAPTERS: Limit.HOST_ADAPTERS,
    server_pb2.LIMIT_KV_CACHE: Limit.KV_CACHE,
    server_pb2.LIMIT_MAX_RUNNING: Limit.MAX_RUNNING,
}


def adapter_info(message: adapters_pb2.Adapter) -> AdapterInfo:
    """One revision."""
    return AdapterInfo(
        name=message.name,
        revision=message.revision,
        weights_digest=message.weights_digest,
        base_model=message.base_model,
        rank=message.rank,
        targets=tuple(message.targets),
        parameters=message.parameters,
        size=message.bytes,
        tier=TIER_OF.get(message.tier, Tier.DISK),
        pinned=message.pinned,
        leases=message.leases,
        created=_time(message.created),
        last_used=_time(message.last_used) if message.HasField("last_used") else None,
        labels=dict(message.labels),
        training=dict(message.training),
        current=message.current,
        etag=message.etag,
        has_chat_template=message.has_chat_template,
    )


def adapter_details(message: adapters_pb2.GetAdapterResponse) -> AdapterDetails:
    """An adapter and its name's revisions."""
    return AdapterDetails(
        adapter=adapter_info(message.adapter),
        revisions=tuple(adapter_info(revision) for revision in message.revisions),
    )


def eviction(message: adapters_pb2.EvictAdapterResponse) -> Eviction:
    """Outcome of an eviction."""
    return Eviction(evicted=message.evicted, freed_bytes=message.freed_bytes)


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server is."""
    base, budgets = message.base_model, message.budgets
    parts = base.fingerprint
    return ServerInfo(
        version=message.version,
        base_model=BaseModel(
            name=base.name,
            architecture=base.architecture,
            quantization=base.quantization,
            dtype=base.dtype,
            parameters=base.parameters,
            size=base.bytes,
            fingerprint=BaseFingerprint(
                weights=parts.weights,
                tokenizer=parts.tokenizer,
                quantization=parts.quantization,
                template=parts.template,
            ),
        ),
        device=message.device,
        backend=message.backend,
        budgets=Budgets(
            host_adapter_bytes=budgets.host_adapter_bytes,
            device_adapter_bytes=budgets.device_adapter_bytes,
            kv_cache_bytes=budgets.kv_cache_bytes,
            kv_cache_tokens=budgets.kv_cache_tokens,
            max_batch_tokens=budgets.max_batch_tokens,
            max_running=budgets.max_running,
            max_queue=budgets.max_queue,
        ),
        context_length=message.context_length,
        uptime_s=seconds(message.uptime),
        adapters_registered=message.adapters_registered,
        adapters_on_device=message.adapters_on_device,
        engine_starts=message.engine_starts,
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
    )


def serving_status(message: health_pb2.HealthCheckResponse) -> ServingStatus:
    """Answer of the health service."""
    return _STATUS.get(message.status, ServingStatus.UNKNOWN)


def adapter_event(message: adapters_pb2.WatchAdaptersResponse) -> AdapterEvent:
    """One event of a watch."""
    return AdapterEvent(
        kind=_KINDS.get(message.event, AdapterEventKind.UNKNOWN),
        sequence=message.sequence,
        time=_time(message.time),
        adapter=adapter_info(message.adapter) if message.HasField("adapter") else None,
        detail=message.detail,
    )


def capacity(message: server_pb2.PlanCapacityResponse) -> Capacity:
    """What would fit."""
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
            Shortfall(
                limit=_LIMITS.get(short.limit, Limit.NONE),
                flag=short.flag,
                needed=short.needed,
                available=short.available,
                message=short.message,
            )
            for short in message.shortfalls
        ),
    )


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
