"""Metrics labelled by tenant: usage since the server's start, and stored bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer_server.quotas.usage import UsageBook
from veneer_server.quotas.usage_store import UsageCounts
from veneer_server.telemetry.adapter_series import MAX_NAMES, OTHER

_COUNTERS: Final = {
    "requests": ("requests", 1, "Generate requests that had an answer, by tenant."),
    "prompt_tokens": ("prompt_tokens", 1, "Prompt tokens by tenant."),
    "cached_prompt_tokens": (
        "cached_prompt_tokens",
        1,
        "Prompt tokens found in the prefix cache, by tenant.",
    ),
    "generation_tokens": ("generated_tokens", 1, "New tokens by tenant."),
    "adapter_byte_seconds": (
        "adapter_byte_hours",
        3600,  # Prometheus counts time in seconds
        "Bytes of stored adapters, times seconds.",
    ),
}
"""Metric -> field of `UsageCounts`, factor, and help."""


class UsageSeries(Collector):
    """Usage by tenant, read by scrapes. The first `MAX_NAMES` tenants become labels; others are
    summed."""

    def __init__(self, book: UsageBook) -> None:
        self._book = book

    def describe(self) -> Iterable[Metric]:
        """Empty families; `registry.register` needs their names."""
        return [*self._counters().values(), self._gauge()]

    def collect(self) -> Iterable[Metric]:
        # Copies, since another thread adds to both.
        totals, stored = dict(self._book.totals), dict(self._book.stored)
        shown = set([*totals][:MAX_NAMES])
        counts: dict[str, UsageCounts] = {}
        for tenant, count in totals.items():
            name = tenant if tenant in shown else OTHER
            counts[name] = counts.get(name, UsageCounts()) + count
        families = self._counters()
        for name, (field, times, _) in _COUNTERS.items():
            for tenant, count in counts.items():
                families[name].add_metric([tenant], getattr(count, field) * times)
        sizes: dict[str, int] = {}
        for tenant, size in stored.items():
            name = tenant if tenant in shown or len(shown) < MAX_NAMES else OTHER
            sizes[name] = sizes.get(name, 0) + size
        gauge = self._gauge()
        for tenant, size in sizes.items():
            gauge.add_metric([tenant], size)
        return [*families.values(), gauge]

    @staticmethod
    def _counters() -> dict[str, CounterMetricFamily]:
        return {
            name: CounterMetricFamily(f"veneer_tenant_{name}", text, labels=["tenant"])
            for name, (_, _, text) in _COUNTERS.items()
        }

    @staticmethod
    def _gauge() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "veneer_tenant_adapter_bytes", "Bytes of stored adapters.", labels=["tenant"]
        )
