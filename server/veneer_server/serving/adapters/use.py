"""When adapters were last requested, and where the engine finds their weights."""

from __future__ import annotations

import time
from collections.abc import Callable

from veneer_registry.adapter import AdapterRef
from veneer_registry.records import AdapterRecord

from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.wire.messages import AdapterSource

__all__ = ["AdapterUse", "source_of"]


class AdapterUse:
    """When each name's revisions were last requested since the server started."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}

    def touch(self, ref: AdapterRef) -> None:
        """Record a request for the revision."""
        self._last[ref.name, ref.revision] = self._clock()

    def last(self, ref: AdapterRef) -> float | None:
        """When it was last requested, in Unix seconds; None if it was not."""
        return self._last.get((ref.name, ref.revision))

    def recent(self) -> list[tuple[str, str]]:
        """Names and revisions, most recently requested first."""
        return sorted(self._last, key=lambda key: self._last[key], reverse=True)

    def forget(self, ref: AdapterRef) -> None:
        """Drop a revision that the name no longer has."""
        self._last.pop((ref.name, ref.revision), None)


def source_of(registry: AdapterRegistry, record: AdapterRecord) -> AdapterSource:
    """Where the engine finds the weights of a revision."""
    return AdapterSource(
        weights_digest=record.ref.weights_digest,
        folder=str(registry.weights_folder(record.ref)),
        parameters=record.manifest.parameters,
        name=record.ref.short,
    )
