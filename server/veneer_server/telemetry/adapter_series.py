"""Metrics labelled by tenant and adapter name: bounded in number, and removed with the adapter.

Only here do names become labels. They come from the registry, never from a request, and at
most `MAX_NAMES` of them are used: all others are summed as ``_other``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Series
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from veneer_server.wire.messages import Occupancy, ResidencyChanged, split_key

MAX_NAMES: Final = 200
"""Maximum number of names that become labels; later ones are counted as ``_other``."""

OTHER: Final = "_other"


class TenantCatalogs(Protocol):
    """The part of `Tenants` that this module uses; thread-safe."""

    def __contains__(self, name: object) -> bool:
        """Whether a (tenant, name) is registered."""

    def names(self, key: str) -> Iterable[str]:
        """The names that share the weights of a resident copy."""

    def asked_as(self, key: str) -> Iterable[str]:
        """The names that callers may now use for the weights of a resident copy."""


class _Empty:
    def __contains__(self, name: object) -> bool:
        return False

    def names(self, key: str) -> Iterable[str]:
        return ()

    def asked_as(self, key: str) -> Iterable[str]:
        return ()


@dataclass(frozen=True, slots=True)
class ResidentAdapters:
    """The adapters in memory, by weights.

    Attributes:
        resident: resident adapters, most recently changed first.
        running, waiting: digests of the adapters of running and of waiting requests.
        at_most: number of adapters of the current mean size that the DEVICE tier can hold.
    """

    resident: tuple[ResidencyChanged, ...]
    running: tuple[str, ...]
    waiting: tuple[str, ...]
    at_most: int


class AdapterSeries(Collector):
    """Residency and use by adapter name. Updated by the event loop, read by scrapes.

    Residency is tracked by weights, since names may share them, and names are looked up in
    the catalog at each scrape. So a name that was deleted never shows its old state, and one
    with several revisions in memory shows each of their tiers.
    """

    def __init__(
        self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Args:
        clock: Unix seconds.
        """
        self.catalog: TenantCatalogs = _Empty()
        self.device_budget = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._resident: dict[str, ResidencyChanged] = {}
        self._running: tuple[str, ...] = ()
        self._waiting: tuple[str, ...] = ()
        self._changed = clock()
        self._requested: set[tuple[str, str]] = set()
        """(tenant, name) pairs that are labels."""
        registry.register(self)
        # Registered after this collector, since this collector removes stale series.
        self._requests = Series(
            "veneer_adapter_requests_total",
            "Requests by adapter.",
            ["tenant", "adapter_name"],
            registry=registry,
        )

    # -------------------------------------------------------------- updates

    def requested(self, tenant: str, name: str) -> None:
        """Count a request for an adapter of a tenant."""
        key = (tenant, name)
        with self._lock:
            if key not in self._requested and len(self._requested) >= MAX_NAMES:
                key = (OTHER, OTHER)
            else:
                self._requested.add(key)
            self._requests.labels(*key).inc()

    def residency(self, event: ResidencyChanged) -> None:
        """Record an adapter's new tier or pin."""
        with self._lock:
            self._resident.pop(event.weights_digest, None)
            if event.tier != "disk":
                self._resident[event.weights_digest] = event  # as the last one

    def occupancy(self, event: Occupancy) -> None:
        """Record which adapters have running and waiting requests."""
        now = (event.running_adapters, event.waiting_adapters)
        with self._lock:
            if now != (self._running, self._waiting):
                self._running, self._waiting = now
                self._changed = self._clock()

    def engine_silent(self) -> None:
        """Record that nothing runs or waits until the engine steps again."""
        with self._lock:
            self._running = self._waiting = ()
            self._changed = self._clock()

    # -------------------------------------------------------------- scrapes

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Empty families; `registry.register` needs their names."""
        return self._families()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        loaded, info = self._families()
        with self._lock:
            self._forget_deleted()
            resident = list(self._resident.values())
            running, waiting, changed = self._running, self._waiting, self._changed
        for labels, count in self._loaded(resident).items():
            loaded.add_metric(labels, count)
        at_most = self._at_most(resident)
        info.add_metric([str(at_most), self._joined(running), self._joined(waiting)], changed)
        return loaded, info

    def held(self) -> ResidentAdapters:
        """The adapters in memory now; thread-safe."""
        with self._lock:
            resident = tuple(reversed(self._resident.values()))
            return ResidentAdapters(
                resident, self._running, self._waiting, self._at_most(resident)
            )

    def _forget_deleted(self) -> None:
        """Remove the series of deleted names, which frees their labels for others."""
        for key in [k for k in self._requested if k not in self.catalog]:
            self._requested.remove(key)
            self._requests.remove(*key)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "veneer_adapter_loaded",
                "1 for each name of an adapter in memory; tier is the nearest that holds it.",
                labels=["tenant", "adapter_name", "tier", "pinned"],
            ),
            GaugeMetricFamily(
                "veneer_lora_requests_info",
                "Adapters of running and of waiting requests; Unix time of the last change.",
                labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            ),
        )

    def _loaded(self, resident: list[ResidencyChanged]) -> Counter[tuple[str, str, str, str]]:
        """Count of names by tenant, name, tier and pin: 1, or more for ``_other``."""
        # A name may have several revisions in memory.
        found = {
            ((split_key(state.weights_digest)[0], name), state.tier, str(state.pinned).lower())
            for state in resident
            for name in self.catalog.names(state.weights_digest)
        }
        shown = set(sorted({key for key, _, _ in found})[:MAX_NAMES])
        others = (OTHER, OTHER)
        return Counter(
            (*(key if key in shown else others), tier, pinned) for key, tier, pinned in found
        )

    def _at_most(self, resident: Sequence[ResidencyChanged]) -> int:
        """Adapters of the current mean size that the DEVICE tier can hold.

        The server has no fixed maximum; this is an estimate for routers that need one.
        """
        sizes = [state.bytes for state in resident if state.bytes]
        mean = sum(sizes) / len(sizes) if sizes else 1 << 20
        return max(1, int(self.device_budget / mean))

    def _joined(self, digests: tuple[str, ...]) -> str:
        names = sorted({name for digest in digests for name in self.catalog.names(digest)})
        return ",".join(names[:MAX_NAMES])
