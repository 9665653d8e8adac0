"""Metrics labelled by tenant: bounded in number.

Names of tenants come from keys and tokens, never from a request. Users for whom a gateway calls
are counted under the gateway's tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

MAX_TENANTS: Final = 50
"""Maximum number of tenants that become labels; later ones are counted as ``_other``."""

OTHER: Final = "_other"

_SECONDS: Final = (0.05, 0.25, 1, 5, 20, 80)


class TenantSeries(Collector):
    """Queue and refusals by tenant. Updated by the event loop, read by scrapes' threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._named: set[str] = set()
        self.waiting: Callable[[], Mapping[str, int]] = dict
        """Sequences without a first token, by tenant."""
        registry.register(self)
        self._wait = Histogram(
            "veneer_tenant_queue_time_seconds",
            "From arrival to the first step, by tenant.",
            ["tenant"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._refusals = Counter(
            "veneer_tenant_refusals_total",
            "Requests that were refused for overload, by tenant and cause.",
            ["tenant", "cause"],
            registry=registry,
        )

    def waited(self, tenant: str, seconds: float) -> None:
        """Count a request's time in the queue."""
        self._wait.labels(self._label(tenant)).observe(seconds)

    def refused(self, tenant: str, cause: str) -> None:
        """Count a refusal."""
        self._refusals.labels(self._label(tenant), cause).inc()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The queue at the moment of a scrape."""
        gauge = GaugeMetricFamily(
            "veneer_tenant_requests_waiting",
            "Sequences without a first token, by tenant.",
            labels=["tenant"],
        )
        counts = dict.fromkeys(list(self._named), 0)
        for tenant, count in self.waiting().items():
            label = self._label(tenant)
            counts[label] = counts.get(label, 0) + count
        for label, count in sorted(counts.items()):
            gauge.add_metric([label], count)
        yield gauge

    def _label(self, tenant: str) -> str:
        if tenant in self._named:
            return tenant
        if not tenant:
            return OTHER  # the server's own requests
        if len(self._named) >= MAX_TENANTS:
            return OTHER
        self._named.add(tenant)
        return tenant
