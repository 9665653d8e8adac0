"""Metrics of registries and their followers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer_server.follower.follower import Follower

_FETCH: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class FollowerSeries(Collector):
    """A follower's connection to its registry, and its disk cache."""

    def __init__(self) -> None:
        self._follower: Follower | None = None
        self.fetch_seconds = Histogram(
            "veneer_adapter_fetch_seconds",
            "Time from the first request for an adapter that is not on this machine until "
            "its arrival.",
            buckets=_FETCH,
            registry=None,
        )

    def watch(self, follower: Follower, registry: CollectorRegistry) -> None:
        """Read this follower from now on."""
        self._follower = follower
        registry.register(self)
        registry.register(self.fetch_seconds)

    def describe(self) -> Iterable[Metric]:
        """Empty: the names are known only when they are collected."""
        return []

    def collect(self) -> Iterable[Metric]:
        follower = self._follower
        if follower is None:
            return
        standing, link = follower.standing, follower.link
        cache, fetching = follower.cache, follower.fetching
        yield GaugeMetricFamily(
            "veneer_registry_connected",
            "1 while this follower is connected to its registry.",
            float(standing.connected),
        )
        yield GaugeMetricFamily(
            "veneer_registry_lag_seconds",
            "Time since this follower's view of its registry was known to be current.",
            standing.lag_s,
        )
        yield CounterMetricFamily(
            "veneer_registry_connects", "Connections to the registry.", link.connects
        )
        yield CounterMetricFamily(
            "veneer_registry_resyncs",
            "Connections that needed a snapshot although a view existed.",
            link.resyncs,
        )
        yield GaugeMetricFamily(
            "veneer_adapter_disk_cache_bytes", "Bytes of adapters on disk.", cache.bytes
        )
        yield GaugeMetricFamily(
            "veneer_adapter_disk_cache_entries", "Adapters on disk.", len(cache)
        )
        yield CounterMetricFamily(
            "veneer_adapter_disk_cache_evictions",
            "Adapters evicted from the disk cache.",
            cache.evictions,
        )
        yield CounterMetricFamily(
            "veneer_adapter_disk_cache_damaged",
            "Adapters on disk that were found damaged and dropped.",
            cache.damaged_found,
        )
        fetches = CounterMetricFamily(
            "veneer_adapter_fetches", "Fetches of adapters by result.", labels=["result"]
        )
        fetches.add_metric(["ok"], fetching.fetched)
        fetches.add_metric(["failed"], fetching.failed)
        yield fetches
        yield CounterMetricFamily(
            "veneer_adapter_fetched_bytes", "Bytes fetched.", fetching.fetched_bytes
        )


class RegistrySeries(Collector):
    """The number of a registry's followers."""

    def __init__(self, followers: Callable[[], int]) -> None:
        self._followers = followers

    def describe(self) -> Iterable[Metric]:
        """Empty: the name is known only when it is collected."""
        return []

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "veneer_followers", "Followers whose lease has not expired.", self._followers()
        )
