"""The `Adapter` message: an adapter's state in the registry, the engine and `AdapterUse`."""

from __future__ import annotations

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import Tier
from veneer_registry.records import AdapterRecord
from veneer_registry.terminal import visible

from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.rpc import convert
from veneer_server.serving.adapters.use import AdapterUse
from veneer_server.serving.tenants.registry import AdapterRegistry

__all__ = ["AdapterView", "as_shared"]


class AdapterView:
    """Builds `Adapter` messages."""

    def __init__(
        self, registry: AdapterRegistry, engine: TenantEngine, use: AdapterUse
    ) -> None:
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
            # Its uploader's own words, shown to whoever may use the adapter.
            training={visible(k): visible(v) for k, v in manifest.training.items()},
            current=record.current,
            etag=record.etag,
            has_chat_template=manifest.chat_template is not None,
            state=_state(record),
            aliases=[f"{ref.name}/{alias}" for alias in record.aliases],
            disk_bytes=record.bytes,
            retain=record.retain,
            shared=record.shared,
        )
        if (last := self._use.last(ref)) is not None:
            message.last_used.CopyFrom(convert.timestamp(last))
        return message


def as_shared(message: adapters_pb2.Adapter, owner: str, name: str) -> adapters_pb2.Adapter:
    """The message as another tenant sees it, which calls the adapter ``name``: without what the
    use by others tells."""
    aliases = [name + alias[len(message.name) :] for alias in message.aliases]
    message.tenant, message.name = owner, name
    message.ClearField("aliases")
    message.aliases.extend(aliases)
    for field in ("leases", "last_used", "etag"):
        message.ClearField(field)
    return message


def _state(record: AdapterRecord) -> adapters_pb2.AdapterState:
    if record.quarantined is not None:
        return adapters_pb2.ADAPTER_STATE_QUARANTINED
    if record.foreign:
        return adapters_pb2.ADAPTER_STATE_OTHER_BASE
    return adapters_pb2.ADAPTER_STATE_READY
