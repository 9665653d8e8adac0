"""Traces of requests, as an OTLP receiver gets them: the standard's own gRPC service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from veneer_registry.errors import InvalidField

from tests.ports import free_port
from tests.refused import refused
from tests.unit.server.rpc.front_harness import failure, make_adapter, prompt, running, until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00"


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - its name in gRPC
        for group in request.resource_spans:
            self.resources.append(told(group.resource.attributes))
            for scope in group.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def roots(self) -> list[Span]:
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]

    def below(self, root: Span) -> list[Span]:
        """Its children, in their order."""
        found = [span for span in self.spans if span.parent_span_id == root.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def told(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    found: dict[str, Any] = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = (
            [v.string_value for v in value.values] if kind == "array_value" else value
        )
    return found


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Receiver, str]]:
    server, receiver = grpc.aio.server(), Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans are sent at once; the default is every five seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")


async def test_a_request_is_one_trace_from_its_arrival_to_its_end(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with receiving() as (receiver, endpoint):
        async with running(
            base_folder, front_cache, tmp_path, otlp_traces_endpoint=endpoint
        ) as front:
            pushed = await front.push(make_adapter(tmp_path / "adapter"), "mine")
            answer = await front.inference.Generate(
                prompt(adapter="mine"), metadata=(("traceparent", SAMPLED),)
            )
            await until(lambda: len(receiver.roots()) == 1)
        (root,) = receiver.roots()
        assert root.name == "veneer.v1.InferenceService/Generate"
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
        facts = told(root.attributes)
        assert facts["veneer.adapter"] == "mine"
        assert facts["veneer.adapter.revision"] == pushed.adapter.revision
        assert facts["veneer.adapter.tier"] in ("disk", "host", "device")
        assert facts["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
        assert facts["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
        assert facts["gen_ai.response.finish_reasons"] == ["length"]
        assert facts["gen_ai.request.id"] == answer.request_id
        names = [span.name for span in receiver.below(root)]
        assert [name for name in names if name != "adapter load"] == [
            "queue",
            "prefill",
            "decode",
        ]
        assert receiver.resources[0]["service.name"] == "veneer"
        at = root.start_time_unix_nano
        for span in receiver.below(root):
            assert at <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
            at = span.end_time_unix_nano


async def test_http_is_traced_too_and_a_stream_ends_with_its_last_token(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        receiving() as (receiver, endpoint),
        running(
            base_folder,
            front_cache,
            tmp_path,
            otlp_traces_endpoint=endpoint,
            openai_listen="127.0.0.1:0",
        ) as front,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
    ):
        body = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 3, "stream": True}
        url = f"http://{front.addresses['openai']}/v1/completions"
        sent = await http.post(url, json=body, headers={"traceparent": SAMPLED})
        assert sent.status_code == 200
        await until(lambda: len(receiver.roots()) == 1)
        (root,) = receiver.roots()
        assert root.name == "POST /v1/completions"
        assert root.trace_id.hex() == TRACE
        assert told(root.attributes)["gen_ai.usage.output_tokens"] == 3


async def test_a_refusal_is_a_failed_span_and_the_text_of_a_prompt_is_in_none(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        receiving() as (receiver, endpoint),
        running(base_folder, front_cache, tmp_path, otlp_traces_endpoint=endpoint) as front,
    ):
        await failure(front.inference.Generate(prompt("secret words", adapter="nobody")))
        await until(lambda: len(receiver.roots()) == 1)
        (root,) = receiver.roots()
        assert root.status.code == Status.STATUS_CODE_ERROR
        assert told(root.attributes)["error.type"] == "ADAPTER_NOT_FOUND"
        await front.inference.Generate(prompt("secret words"))
        await until(lambda: len(receiver.roots()) == 2)
        assert not any("secret" in str(span) for span in receiver.spans)
        assert len({span.trace_id for span in receiver.roots()}) == 2, "each has its own trace"


async def test_what_the_caller_does_not_sample_is_not_sent(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        receiving() as (receiver, endpoint),
        running(base_folder, front_cache, tmp_path, otlp_traces_endpoint=endpoint) as front,
    ):
        for parent in (NOT_SAMPLED, "nonsense"):
            await front.inference.Generate(prompt(), metadata=(("traceparent", parent),))
        await until(lambda: len(receiver.roots()) == 1)
        (root,) = receiver.roots()
        assert root.trace_id.hex() != TRACE
        assert not root.parent_span_id


@pytest.mark.push
@pytest.mark.timeout(60)
async def test_a_receiver_that_is_away_disturbs_nobody(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    async with running(
        base_folder, front_cache, tmp_path, otlp_traces_endpoint=endpoint
    ) as front:
        for _ in range(3):
            assert (await front.inference.Generate(prompt())).text


async def test_an_endpoint_that_is_no_url_is_refused_at_start(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    with refused(InvalidField, field="otlp_traces_endpoint"):
        async with running(
            base_folder, front_cache, tmp_path, otlp_traces_endpoint="127.0.0.1:4317"
        ):
            pass
