"""Prometheus metrics of the front process, with a separate registry and port.

Adapter names become labels only in `adapter_series`, which bounds their number.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Final, Protocol, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from veneer_registry.adapter import Tier

from veneer_server.engine_client.client import EngineEvent
from veneer_server.quotas.usage import UsageBook
from veneer_server.telemetry.adapter_series import AdapterSeries, TenantCatalogs
from veneer_server.telemetry.tenant_series import TenantSeries
from veneer_server.telemetry.usage_series import UsageSeries
from veneer_server.telemetry.watched_series import WatchedSeries
from veneer_server.wire.messages import (
    LOST,
    AdapterFailed,
    AdapterLoaded,
    ConstraintDone,
    ConstraintOutcome,
    Evicted,
    EvictionCause,
    MatcherEnded,
    Occupancy,
    ResidencyChanged,
    StepDone,
)

_FIRST_TOKEN: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80,
)  # fmt: skip
_INTER_TOKEN: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
)  # fmt: skip
_SWAP: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SMOOTHING: Final = 0.1
_LONGEST_REASON: Final = 200
_ADAPTERS: Final = (0, 1, 2, 4, 8, 16, 32, 64)


class SizedCatalog(TenantCatalogs, Sized, Protocol):
    """A catalog that knows how many names it has."""


class Metrics:
    """Every series that the server exposes. Cheap enough to call per token."""

    def __init__(self) -> None:
        # "Created" metrics add a gauge for each counter that no rule or dashboard reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"veneer_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"veneer_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], *labels: str
        ) -> Histogram:
            return Histogram(f"veneer_{name}", text, labels, registry=registry, buckets=buckets)

        self.running = gauge("num_requests_running", "Sequences in the running batch.")
        self.waiting = gauge("num_requests_waiting", "Sequences waiting in the queue.")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Fraction of KV blocks in use.")
        self.prefix_usage = gauge(
            "prefix_cache_usage_ratio", "Fraction of KV blocks held only by the prefix cache."
        )
        self.ready = gauge("ready", "1 while generate calls are answered, else 0.")
        self.engine_healthy = gauge(
            "engine_healthy", "1 while the engine is up and its step loop answers."
        )
        self.engine_info = gauge(
            "engine_info", "1; device and backend in use.", "device", "backend"
        )
        self.backend_info = gauge(
            "backend_info",
            "1; backend that executes steps, and why auto did not choose the native one.",
            "backend",
            "instructions",
            "reason",
        )
        self.adapter_bytes = gauge("adapter_bytes", "Bytes of adapters in memory.", "tier")
        self.adapter_budget = gauge(
            "adapter_budget_bytes", "Memory budget for adapters, in bytes.", "tier"
        )
        self.resident = gauge("adapters_resident", "Adapters in memory.", "tier")
        self.registered = gauge("adapters_registered", "Names in the registry.")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "Time from arrival to the first token (TTFT).",
            _FIRST_TOKEN,
            "adapter_tier",
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "Time between tokens of one stream (inter-token latency).",
            _INTER_TOKEN,
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last token.", _FIRST_TOKEN
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Time from arrival to the first step.", _FIRST_TOKEN
        )
        self.request_prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "New tokens of a request.", _TOKENS
        )
        self.load_seconds = histogram(
            "adapter_load_seconds",
            "Duration of the stages of a load.",
            _SWAP,
            "source",
            "stage",
        )
        self.activate_seconds = histogram(
            "adapter_activate_seconds", "Duration of a load or activation.", _SWAP
        )
        self.load_failures = counter(
            "adapter_load_failures_total", "Loads and activations that failed.", "reason"
        )
        self.loader_restarts = counter(
            "adapter_loader_restarts_total",
            "Adapter loader processes that exited or were killed on timeout.",
        )
        self.step_seconds = histogram(
            "step_seconds", "Duration of a step.", _INTER_TOKEN, "phase"
        )
        self.step_rows = histogram("step_batch_rows", "Tokens computed in a step.", _ROWS)
        self.step_adapters = histogram(
            "step_adapters", "Different adapters in a step.", _ADAPTERS
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens.")
        self.generation_tokens = counter("generation_tokens_total", "New tokens.")
        self.drafted_tokens = counter(
            "speculation_drafted_tokens_total", "Tokens that speculation guessed."
        )
        self.accepted_tokens = counter(
            "speculation_accepted_tokens_total", "Tokens that speculation guessed rightly."
        )
        self.prefix_asked = counter(
            "prefix_cache_queried_tokens_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_found = counter(
            "prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache."
        )
        self.requests = counter("requests_total", "Requests that succeeded.", "finish_reason")
        self.failures = counter("request_failures_total", "Requests that failed.", "reason")
        self.ignored_fields = counter(
            "http_ignored_fields_total", "Fields of JSON requests without effect.", "field"
        )
        self.audit_written = counter("audit_lines_written_total", "Lines of the audit log.")
        self.audit_lost = counter(
            "audit_lines_lost_total", "Audit lines lost because the disk was full or slow."
        )
        self.audit_left_out = counter(
            "audit_lines_left_out_total",
            "Refusals that the audit log summarizes because many were alike.",
        )
        self.stored_responses = gauge(
            "stored_responses", "Responses and conversations that are stored."
        )
        self.stored_bytes = gauge(
            "stored_responses_bytes", "Disk space of stored responses, in bytes."
        )
        self.not_stored = counter(
            "responses_not_stored_total",
            "Responses that were not stored for lack of room, or because the disk failed.",
        )
        self.lookups = counter(
            "adapter_cache_lookups_total", "Adapter lookups by tier.", "tier", "result"
        )
        self.evictions = counter(
            "adapter_evictions_total", "Adapters evicted from a tier.", "tier", "cause"
        )
        self.constraints = counter(
            "constraints_total",
            "Constraint trials, and constraints that stopped a generation.",
            "phase",
            "outcome",
        )
        self.constraint_seconds = histogram(
            "constraint_compile_seconds", "CPU time of compiling a constraint.", _SWAP
        )
        self.matcher_ends = counter(
            "constraint_matcher_ends_total",
            "Matcher processes that ended and were replaced.",
            "cause",
        )
        self.adapters = AdapterSeries(registry)
        """Metrics by adapter name."""
        self.tenants = TenantSeries(registry)
        """Metrics by tenant."""
        self.watched = WatchedSeries(registry)
        self.handled = Counter(
            "grpc_server_handled_total",
            "Completed calls.",
            ("grpc_service", "grpc_method", "grpc_code"),
            registry=registry,
        )
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Duration of calls.",
            ("grpc_service", "grpc_method"),
            registry=registry,
            buckets=_FIRST_TOKEN,
        )
        self.recent_step_s = 0.0
        """Smoothed duration of a decode step in seconds; 0 before the first."""
        self.on_device = 0
        """Adapters in the DEVICE tier."""
        for outcome in get_args(ConstraintOutcome):
            self.constraints.labels("trial", outcome)
        for tier in ("host", "device"):
            self.adapter_bytes.labels(tier).set(0)
            self.resident.labels(tier).set(0)
            # If a series starts above 0, Prometheus sees no increase for its first event.
            for cause in get_args(EvictionCause):
                self.evictions.labels(tier, cause)

    def set_budgets(self, *, host: int, device: int) -> None:
        """Set the byte budgets of the two memory tiers."""
        self.adapter_budget.labels("host").set(host)
        self.adapter_budget.labels("device").set(device)
        self.adapters.device_budget = device

    def engine_started(self, device: str, backend: str, why_slower: str = "") -> None:
        """Record the device and backend in use.

        Args:
            why_slower: why torch is used although auto prefers the native kernels.
        """
        self.engine_info.clear()
        self.engine_info.labels(device, backend).set(1)
        self.backend_info.clear()
        name, _, rest = backend.partition(" ")
        instructions = rest.strip("()").partition(",")[0]  # "avx2", also from "avx2, prebuilt"
        reason = why_slower[:_LONGEST_REASON]
        self.backend_info.labels(name, instructions, reason).set(1)

    def ask(self, catalog: SizedCatalog) -> None:
        """Set the catalog; each scrape reads it in another thread."""
        self.registered.set_function(lambda: len(catalog))
        self.adapters.catalog = catalog

    def count_usage(self, book: UsageBook) -> None:
        """Expose the usage of tenants."""
        self.registry.register(UsageSeries(book))

    def adapter_found(self, tier: Tier) -> None:
        """Count a hit in the tier that had a request's adapter, and misses in nearer tiers."""
        for nearer in ("device", "host", "disk"):
            hit = nearer == tier.value
            self.lookups.labels(nearer, "hit" if hit else "miss").inc()
            if hit:
                return

    def on_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`."""
        match event:
            case StepDone():
                self._step(event)
            case Occupancy():
                self._occupancy(event)
            case ResidencyChanged():
                self._residency(event)
            case AdapterLoaded():
                self.loader_restarts.inc(LOST in event.stages)
                for stage, seconds in event.stages.items():
                    self.load_seconds.labels(event.source, stage).observe(seconds)
                self.activate_seconds.observe(sum(event.stages.values()))
            case AdapterFailed():
                self.load_failures.labels(event.error.reason).inc()
                self.loader_restarts.inc(int(event.error.metadata.get("loaders", "0")))
            case Evicted():
                self.evictions.labels(event.tier, event.cause).inc()
            case ConstraintDone():
                self.constraints.labels(event.phase, event.outcome).inc()
                if event.seconds:
                    self.constraint_seconds.observe(event.seconds)
            case MatcherEnded():
                self.matcher_ends.labels(event.cause).inc()

    def engine_health(self, healthy: bool) -> None:
        """Record whether the engine's step loop advances; if not, nothing runs."""
        self.engine_healthy.set(healthy)
        if healthy:
            return
        for gauge in (self.running, self.waiting, self.kv_usage, self.prefix_usage):
            gauge.set(0)
        self.adapters.engine_silent()

    def _step(self, step: StepDone) -> None:
        phase = (
            "decode" if not step.prefill_tokens else "mixed" if step.decode_rows else "prefill"
        )
        self.step_seconds.labels(phase).observe(step.seconds)
        if phase == "decode":
            self.recent_step_s += _SMOOTHING * (step.seconds - self.recent_step_s)
        self.step_rows.observe(step.prefill_tokens + step.decode_rows + step.drafted)
        self.drafted_tokens.inc(step.drafted)
        self.accepted_tokens.inc(step.accepted)
        self.step_adapters.observe(step.adapters)
        self.prefix_asked.inc(step.prefix_asked)
        self.prefix_found.inc(step.prefix_found)

    def _occupancy(self, event: Occupancy) -> None:
        self.running.set(event.running)
        self.waiting.set(event.waiting)
        self.kv_usage.set(event.kv_blocks_used / max(1, event.kv_blocks))
        self.prefix_usage.set(event.kv_blocks_cached / max(1, event.kv_blocks))
        self.adapters.occupancy(event)

    def _residency(self, event: ResidencyChanged) -> None:
        self.adapters.residency(event)
        self.on_device = event.device_count
        self.resident.labels("host").set(event.host_count)
        self.resident.labels("device").set(event.device_count)
        self.adapter_bytes.labels("host").set(event.host_bytes)
        self.adapter_bytes.labels("device").set(event.device_bytes)
