"""The series that routers read, under vLLM's names (``--metrics-names vllm``).

The endpoint pickers of the Gateway API Inference Extension and of llm-d, and AIBrix's gateway,
read a model server's load and adapters from its metrics page, by vLLM's names. Everything here
is derived from our own series at a scrape: nothing is counted twice, at no cost per token.

Where vLLM's series would mislead a router, the endpoint picker's protocol is followed instead:
``running_lora_adapters`` lists the adapters that are resident and ready, as that protocol
defines it. vLLM lists the adapters of running requests, so a warm but idle server looks cold.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from veneer_server.sizing.memory_plan import BLOCK_TOKENS
from veneer_server.telemetry.adapter_series import ResidentAdapters
from veneer_server.telemetry.metrics import Metrics

MAX_ROUTED: Final = 512
"""Maximum adapter names in a list, and maximum series of `lora_adapter_loaded`. If there are
more, running and most recently loaded ones take precedence; routers treat the rest as not
resident."""

_LABELS: Final = ("model_name", "engine")
_ENGINE: Final = "0"
_LEVELS: Final = {"device": "gpu", "host": "cpu"}
_FINISHED: Final = {"cancelled": "abort"}
"""Finish reasons for which vLLM uses another word."""


class VllmSeries(Collector):
    """Collects our series under vLLM's names. Register it once the engine has started."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        model: str,
        kv_tokens: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        model: the base's name, value of the label ``model_name``.
        kv_tokens: capacity of the KV cache.
        clock: Unix seconds.
        """
        self._metrics = metrics
        self._labels = (model, _ENGINE)
        self._blocks = kv_tokens // BLOCK_TOKENS
        self._clock = clock
        self._lock = threading.Lock()
        self._listed: tuple[str, str, str] | None = None
        self._changed = clock()

    def describe(self) -> Iterable[Metric]:
        """The current families; `registry.register` needs their names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """All families of one page."""
        held = self._metrics.adapters.held()
        yield from self._load()
        yield from self._adapters(held)
        yield from self._counts()
        yield from self._times()

    # ------------------------------------------------------------------- parts

    def _load(self) -> Iterator[Metric]:
        ours = self._metrics
        for name, text, gauge in (
            ("num_requests_running", "Sequences in the running batch.", ours.running),
            ("num_requests_waiting", "Sequences waiting in the queue.", ours.waiting),
            ("kv_cache_usage_perc", "Fraction of KV blocks in use, 0 to 1.", ours.kv_usage),
        ):
            yield self._gauge(name, text, _sum(gauge))
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "1; tokens of a KV block, and number of blocks.",
            labels=("block_size", "num_gpu_blocks", "engine"),
        )
        config.add_metric((str(BLOCK_TOKENS), str(self._blocks), _ENGINE), 1)
        yield config

    def _adapters(self, held: ResidentAdapters) -> Iterator[Metric]:
        ready = [state for state in held.resident if state.tier == "device"]
        first = [state for state in ready if state.weights_digest in held.running]
        running = self._names(state.weights_digest for state in (*first, *ready))
        # A resident adapter has no load to wait for; vLLM would count it twice.
        waiting = [name for name in self._names(held.waiting) if name not in set(running)]
        most = max(held.at_most, len(ready))
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are ready, and those that requests wait for; Unix time of the last "
            "change.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        listed = (str(most), ",".join(running), ",".join(waiting))
        info.add_metric(listed, self._since(listed))
        yield info
        yield self._loaded(held)
        yield self._gauge(
            "num_gpu_loaded_lora_adapters", "Adapters that are ready to run.", len(ready)
        )
        in_host = _sum(self._metrics.resident, tier="host")
        yield self._gauge("num_cpu_loaded_lora_adapters", "Adapters in host memory.", in_host)
        yield self._gauge(
            "max_gpu_lora_adapters", "Number of average-size adapters that fit.", most
        )

    def _loaded(self, held: ResidentAdapters) -> Metric:
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter in memory: gpu, ready to run; cpu, in host memory.",
            labels=(*_LABELS, "adapter_name", "level", "pinned"),
        )
        shown: dict[tuple[str, str, str], None] = {}
        for state in held.resident:
            level = _LEVELS.get(state.tier)
            if level is None:
                continue  # pinned, and on its way into memory
            for name in self._metrics.adapters.catalog.asked_as(state.weights_digest):
                if len(shown) < MAX_ROUTED:
                    # Two tenants may have one name.
                    shown[name, level, str(state.pinned).lower()] = None
        for each in shown:
            loaded.add_metric((*self._labels, *each), 1)
        return loaded

    def _counts(self) -> Iterator[Metric]:
        ours = self._metrics
        for name, text, counter in (
            ("prompt_tokens", "Prompt tokens.", ours.prompt_tokens),
            ("generation_tokens", "New tokens.", ours.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up.", ours.prefix_asked),
            ("prefix_cache_hits", "Prompt tokens found.", ours.prefix_found),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._labels, _sum(counter))
            yield family
        ended = CounterMetricFamily(
            "vllm:request_success",
            "Requests that succeeded.",
            labels=(*_LABELS, "finished_reason"),
        )
        for sample in _samples(ours.requests):
            if sample.name.endswith("_total"):
                reason = sample.labels["finish_reason"]
                ended.add_metric((*self._labels, _FINISHED.get(reason, reason)), sample.value)
        yield ended

    def _times(self) -> Iterator[Metric]:
        ours = self._metrics
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", ours.first_token),
            ("inter_token_latency_seconds", "Between tokens of a stream.", ours.inter_token),
            ("e2e_request_latency_seconds", "Arrival to last token.", ours.latency),
            ("request_queue_time_seconds", "Arrival to first step.", ours.queue_time),
            ("request_prompt_tokens", "Prompt tokens.", ours.request_prompt_tokens),
            ("request_generation_tokens", "New tokens.", ours.request_generation_tokens),
        ):
            buckets: dict[str, float] = defaultdict(float)
            total = 0.0
            for sample in _samples(histogram):
                if sample.name.endswith("_bucket"):
                    buckets[sample.labels["le"]] += sample.value
                elif sample.name.endswith("_sum"):
                    total += sample.value
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            if buckets:  # empty before the first request, if our series has labels
                family.add_metric(self._labels, list(buckets.items()), total)
            yield family

    # ------------------------------------------------------------------- helpers

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _names(self, digests: Iterable[str]) -> list[str]:
        """Distinct names that callers use for these weights, at most `MAX_ROUTED`."""
        asked_as = self._metrics.adapters.catalog.asked_as
        names = dict.fromkeys(name for digest in digests for name in asked_as(digest))
        return list(names)[:MAX_ROUTED]

    def _since(self, listed: tuple[str, str, str]) -> float:
        """Time of the lists' last change: of several series, a router uses the latest."""
        with self._lock:
            if listed != self._listed:
                self._listed, self._changed = listed, self._clock()
            return self._changed


def _samples(series: Collector) -> Iterator[Sample]:
    for family in series.collect():
        yield from family.samples


def _sum(series: Collector, **labels: str) -> float:
    """Sum of the samples with the given labels; for a counter, its total."""
    return sum(
        sample.value
        for sample in _samples(series)
        if not sample.name.endswith("_created") and labels.items() <= sample.labels.items()
    )
