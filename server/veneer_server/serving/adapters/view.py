"""What is known of an adapter, gathered from registry, engine and use, as the wire shows it."""

from __future__ import annotations

import time
from collections.abc import Callable

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.registry import AdapterRecord, Registry

from veneer_server.engine_client.client import EngineClient
from veneer_server.rpc import convert
from veneer_server.wire.messages import AdapterSource

__all__ = ["AdapterUse", "AdapterView", "source_of"]


class AdapterUse:
    """When each name's revisions were last asked for, since the server started."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}

    def touch(self, ref: AdapterRef) -> None:
        """The revision was just asked for."""
        self._last[ref.name, ref.revision] = self._clock()

    def last(self, ref: AdapterRef) -> float | None:
        """Unix seconds, or None if it was not."""
        return self._last.get((ref.name, ref.revision))

    def recent(self) -> list[tuple[str, str]]:
        """Names and revisions, the last asked for first."""
        return sorted(self._last, key=lambda key: self._last[key], reverse=True)

    def forget(self, ref: AdapterRef) -> None:
        """The name does not have this revision any more."""
        self._last.pop((ref.name, ref.revision), None)


def source_of(registry: Registry, record: AdapterRecord) -> AdapterSource:
    """Where the engine finds the weights of a revision."""
    return AdapterSource(
        weights_digest=record.ref.weights_digest,
        folder=str(registry.weights_folder(record.ref)),
        parameters=record.manifest.parameters,
        name=record.ref.short,
    )


class AdapterView:
    """Builds `Adapter` messages."""

    def __init__(self, registry: Registry, engine: EngineClient, use: AdapterUse) -> None:
        self._registry = registry
        self._engine = engine
        self._use = use

    def tier(self, record: AdapterRecord) -> Tier:
        """Nearest tier that holds the revision's weights."""
        residency = self._engine.tier(record.ref.weights_digest)
        return Tier.DISK if residency is None else Tier(residency.tier)

    def adapter(self, record: AdapterRecord) -> adapters_pb2.Adapter:
        """The message for one revision."""
        ref, manifest = record.ref, record.manifest
        residency = self._engine.tier(ref.weights_digest)
        message = adapters_pb2.Adapter(
            name=ref.name,
            revision=ref.revision,
            weights_digest=ref.weights_digest,
            base_model=manifest.base_name,
            rank=manifest.max_rank,
            targets=manifest.targets,
            parameters=manifest.parameters,
            bytes=manifest.parameters * self._engine.info.adapter_itemsize,
            tier=convert.tier_to_proto(self.tier(record)),
            pinned=residency is not None and residency.pinned,
            leases=self._registry.leases(ref.weights_digest),
            created=convert.timestamp(record.created),
            labels=dict(record.labels),
            training=dict(manifest.training),
            current=record.current,
            etag=record.etag,
            has_chat_template=manifest.chat_template is not None,
            state=_state(record),
            aliases=[f"{ref.name}/{alias}" for alias in record.aliases],
            disk_bytes=record.bytes,
            retain=record.retain,
        )
        if (last := self._use.last(ref)) is not None:
            message.last_used.CopyFrom(convert.timestamp(last))
        return message


def _state(record: AdapterRecord) -> adapters_pb2.AdapterState:
    if record.quarantined is not None:
        return adapters_pb2.ADAPTER_STATE_QUARANTINED
    if record.foreign:
        return adapters_pb2.ADAPTER_STATE_OTHER_BASE
    return adapters_pb2.ADAPTER_STATE_READY
