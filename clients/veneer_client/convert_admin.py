"""Converts protobuf messages of the adapter service to records and back."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import Tier

from veneer_client.convert import TIER_OF, same_names
from veneer_client.records import (
    AdapterDetails,
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    AdapterState,
    Alias,
    AliasMove,
    AliasTarget,
    Eviction,
    EvictMode,
    HistoryEntry,
    Pushed,
)
from veneer_client.replicas import reached

__all__ = [
    "EVICT_MODES",
    "adapter_details",
    "adapter_event",
    "adapter_info",
    "alias",
    "alias_move",
    "eviction",
    "history_entry",
    "registered",
]

EVICT_MODES: Final = {
    EvictMode.DRAIN: adapters_pb2.EVICT_MODE_DRAIN,
    EvictMode.FAIL_IF_BUSY: adapters_pb2.EVICT_MODE_FAIL_IF_BUSY,
    EvictMode.ABORT: adapters_pb2.EVICT_MODE_ABORT,
}
_STATES: Final = {
    adapters_pb2.ADAPTER_STATE_READY: AdapterState.READY,
    adapters_pb2.ADAPTER_STATE_QUARANTINED: AdapterState.QUARANTINED,
    adapters_pb2.ADAPTER_STATE_OTHER_BASE: AdapterState.OTHER_BASE,
}
_KINDS: Final = {
    getattr(adapters_pb2, f"ADAPTER_EVENT_{kind.name}"): kind
    for kind in AdapterEventKind
    if kind is not AdapterEventKind.UNKNOWN
}


def adapter_info(message: adapters_pb2.Adapter) -> AdapterInfo:
    """One revision."""
    return same_names(
        AdapterInfo,
        message,
        targets=tuple(message.targets),
        size=message.bytes,
        tier=TIER_OF.get(message.tier, Tier.DISK),
        created=_time(message.created),
        last_used=_time(message.last_used) if message.HasField("last_used") else None,
        labels=dict(message.labels),
        training=dict(message.training),
        state=_STATES.get(message.state, AdapterState.UNKNOWN),
        aliases=tuple(message.aliases),
    )


def adapter_details(message: adapters_pb2.GetAdapterResponse) -> AdapterDetails:
    """An adapter and its name's revisions."""
    return AdapterDetails(
        adapter=adapter_info(message.adapter),
        revisions=tuple(adapter_info(revision) for revision in message.revisions),
        revisions_left_out=message.revisions_left_out,
    )


def eviction(message: adapters_pb2.EvictAdapterResponse) -> Eviction:
    """Outcome of an eviction."""
    return same_names(Eviction, message)


def adapter_event(message: adapters_pb2.WatchAdaptersResponse) -> AdapterEvent:
    """One event of a watch."""
    return AdapterEvent(
        kind=_KINDS.get(message.event, AdapterEventKind.UNKNOWN),
        sequence=message.sequence,
        time=_time(message.time),
        adapter=adapter_info(message.adapter) if message.HasField("adapter") else None,
        detail=message.detail,
    )


def alias(message: adapters_pb2.Alias) -> Alias:
    """One alias."""
    return Alias(
        alias=message.alias,
        targets=_targets(message.targets),
        etag=message.etag,
        updated=_time(message.updated),
    )


def alias_move(message: adapters_pb2.SetAliasResponse) -> AliasMove:
    """An alias's targets now and before the move."""
    return AliasMove(
        alias=alias(message.alias),
        previous=_targets(message.previous),
        replicas=reached(message.replicas, message.HasField("replicas")),
    )


def history_entry(message: adapters_pb2.HistoryEntry) -> HistoryEntry:
    """One change."""
    return same_names(HistoryEntry, message, time=_time(message.time))


def _targets(messages: Iterable[adapters_pb2.AliasTarget]) -> tuple[AliasTarget, ...]:
    return tuple(AliasTarget(message.revision, message.weight) for message in messages)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def registered(message: adapters_pb2.RegisterAdapterResponse) -> Pushed:
    """The outcome of a push whose files the server fetched itself."""
    return Pushed(
        adapter=adapter_info(message.adapter),
        published=message.published,
        replaced=message.replaced,
        warnings=tuple(message.warnings),
        skipped=(),
        sent_bytes=0,
        skipped_bytes=0,
        resumes=0,
        replicas=reached(message.replicas, message.HasField("replicas")),
    )
