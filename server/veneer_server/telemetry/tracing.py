"""Traces of generate requests, sent over OTLP; off unless an endpoint is set.

A request's spans are made when it has ended, from times that are recorded anyway, so there is
no cost per token. OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_*, OTEL_TRACES_SAMPLER) set
headers, certificates and sampling. Spans contain no text of prompts or answers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from veneer_registry.errors import InvalidField
from veneer_registry.extras import install_extra

from veneer_server.access.caller import Caller
from veneer_server.logs import get_logger

_log = get_logger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_STOP_S: Final = 2.0
"""Maximum seconds that a stopping server waits for the receiver of its spans."""

Attribute = str | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Phases:
    """Duration of each phase of an admitted request, in seconds.

    Attributes:
        queue_s, load_s: time in the queue, then time waiting for the adapter's load.
        first_token_s: from the request's arrival; 0 if it got no token.
        total_s: from the request's arrival.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


class Tracing:
    """Makes the spans of requests that have ended."""

    def __init__(self, tracer: Any = None, stop: Callable[[], None] = lambda: None) -> None:
        """Args:
        tracer: OpenTelemetry's tracer; None makes no spans.
        stop: sends the remaining spans.
        """
        self._tracer = tracer
        self.stop = stop

    @classmethod
    def to(cls, endpoint: str, version: str) -> Tracing:
        """Send to an OTLP receiver over gRPC. Without ``endpoint``, OpenTelemetry's variables
        set it; if they do not either, nothing is sent.

        Raises:
            InvalidField: OpenTelemetry is not installed, or the endpoint is not a URL.
        """
        if not endpoint and not any(os.environ.get(name) for name in _ENDPOINTS):
            return cls()
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise InvalidField(
                f"--otlp-traces-endpoint is {endpoint[:100]!r}: give a URL such as "
                "http://127.0.0.1:4317, or https:// for a receiver with TLS",
                metadata={"field": "otlp_traces_endpoint"},
            )
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidField(
                f"tracing needs OpenTelemetry ({error}): {install_extra('tracing')}; or "
                "leave --otlp-traces-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT unset",
                metadata={"field": "otlp_traces_endpoint"},
            ) from error
        exporter = OTLPSpanExporter(endpoint=endpoint or None)
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
        named = "veneer" if "OTEL_SERVICE_NAME" not in os.environ else None
        given = {"service.version": version, **({"service.name": named} if named else {})}
        provider = TracerProvider(resource=Resource.create(given), shutdown_on_exit=False)
        processor = BatchSpanProcessor(exporter)
        provider.add_span_processor(processor)
        _log.info("sending traces", endpoint=endpoint or "as OTEL_EXPORTER_OTLP_* say")

        def stop() -> None:
            # Neither flushing nor the provider's shutdown has a time limit of its own.
            flush = threading.Thread(target=processor.force_flush, daemon=True)
            flush.start()
            flush.join(_STOP_S)
            if flush.is_alive():
                exporter.shutdown()  # ends its retries
            provider.shutdown()

        return cls(provider.get_tracer("veneer", version), stop)

    def request(
        self,
        caller: Caller,
        phases: Phases | None,
        outcome: str,
        attributes: Mapping[str, Attribute],
        *,
        failed: str = "",
    ) -> str:
        """Make the spans of a request that has just ended. Returns the trace's id; "" if no
        spans are made.

        Args:
            phases: None if the request was refused before it was admitted.
            outcome: the finish reason, or the error's reason.
            failed: why the request failed; "" if it did not.
        """
        if self._tracer is None:
            return ""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now, ended = time.perf_counter(), time.time_ns()
        began = ended - _nanoseconds(now - caller.began)
        context = TraceContextTextMapPropagator().extract(dict(caller.trace))
        span = self._tracer.start_span(
            caller.method.removeprefix("/"),
            context,
            kind=SpanKind.SERVER,
            start_time=began,
        )
        if span.is_recording():
            for name, value in attributes.items():
                span.set_attribute(name, value)
            span.set_attribute("veneer.outcome", outcome)
            if failed:
                span.set_attribute("error.type", outcome)
                span.set_status(Status(StatusCode.ERROR, failed))
            if phases is not None:
                inside = set_span_in_context(span, context)
                start = ended - _nanoseconds(phases.total_s)
                for name, seconds in _parts(phases):
                    end = min(ended, start + _nanoseconds(seconds))
                    self._tracer.start_span(name, inside, start_time=start).end(end)
                    start = end
        span.end(ended)
        return f"{span.get_span_context().trace_id:032x}"


def _parts(phases: Phases) -> list[tuple[str, float]]:
    """Names and seconds of the phases that a request reached, in order."""
    if not phases.first_token_s:
        return [("queue", phases.total_s)]
    waited = phases.queue_s + phases.load_s
    load = [("adapter load", phases.load_s)] if phases.load_s else []
    return [
        ("queue", phases.queue_s),
        *load,
        ("prefill", max(0.0, phases.first_token_s - waited)),
        ("decode", max(0.0, phases.total_s - phases.first_token_s)),
    ]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
