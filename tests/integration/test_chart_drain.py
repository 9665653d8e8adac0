"""A pod of the Helm chart, played by hand: the real server with the rendered arguments, the
declared probes, and the end of a pod under load.

TLS with keys, the chart's default, runs in the suite; ``CHART_DRAIN=all`` plays plain text
(Kubernetes' own gRPC probes) and certificates of clients (`veneer health`) too.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
from veneer_proto.v1 import inference_pb2_grpc
from veneer_proto.v1.inference_pb2 import FinishReason

from tests.chart.kubelet import Node, running_pod
from tests.chart.pods import pods_of
from tests.chart.render import CHART, VALUES, render
from tests.server_harness import refusal, request

pytestmark = [pytest.mark.verify, pytest.mark.real_base]

TOKENS = 100
"""Of each stream: long enough to run while the pod is being deleted."""
SLOW_TOKENS = 800
"""The same where each probe starts a program."""
PLAYED = ("default", "plaintext", "tls-and-keys")
SHORT = {"drain": {"preStopSeconds": 1, "graceSeconds": 60}}


def played() -> tuple[str, ...]:
    return PLAYED if os.environ.get("CHART_DRAIN") == "all" else PLAYED[:1]


@pytest.fixture(params=played())
async def node(
    request: pytest.FixtureRequest, cache_dir: Path, base_folder: Path, tmp_path: Path
) -> AsyncIterator[Node]:
    values = {**VALUES[request.param], **SHORT}
    rendered = (await asyncio.to_thread(render, {"pod": (CHART, values)}))["pod"]
    (pod,) = pods_of(list(rendered.objects))
    async with running_pod(pod, tmp_path / "root", cache_dir) as node:
        yield node


def by_program(node: Node) -> bool:
    return "exec" in node.pod.container["readinessProbe"]


def tokens_for(node: Node) -> int:
    return SLOW_TOKENS if by_program(node) else TOKENS


class Streams:
    """Callers in the middle of an answer, each over one of the ports."""

    def __init__(self, node: Node, inference: Any, *ports: Literal["grpc", "http"]) -> None:
        self._node = node
        self._most = tokens_for(node)
        self._inference = inference
        self.begun = [asyncio.Event() for _ in ports]
        self.tokens = [0 for _ in ports]
        self.tasks = [
            asyncio.create_task(self._grpc(at) if port == "grpc" else self._http(at))
            for at, port in enumerate(ports)
        ]

    async def began(self) -> None:
        """Wait until each has its first token."""
        await asyncio.gather(*(event.wait() for event in self.begun))

    async def _grpc(self, at: int) -> str:
        asked = request(prompt="Once", stopping={"max_tokens": self._most, "ignore_eos": True})
        reason = ""
        async for message in self._inference.GenerateStream(
            asked, metadata=self._node.metadata
        ):
            self.begun[at].set()
            if message.HasField("final"):
                self.tokens[at] = message.final.usage.completion_tokens
                reason = FinishReason.Name(message.final.finish_reason)
        return reason

    async def _http(self, at: int) -> str:
        body = {
            "model": "smollm2-135m",
            "prompt": "Once",
            "max_tokens": self._most,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reason = ""
        async with (
            self._node.http() as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                self.begun[at].set()
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                if chunk.get("usage"):
                    self.tokens[at] = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
        return reason


async def test_a_pod_starts_drains_and_ends_as_its_node_expects(node: Node) -> None:
    await node.start()
    # It answers from its first moment, and is not ready while it loads: no restart, no calls.
    while not await node.probe("livenessProbe"):
        assert node.process is not None
        assert node.process.returncode is None, (node.root / "server.log").read_text()
    loading = [await node.probe(kind) for kind in ("startupProbe", "readinessProbe")]
    assert await node.probe("livenessProbe")
    if not by_program(node):  # which takes as long as the start
        assert loading == [False, False]
    await node.ready()
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert await node.probe(kind), kind

    async with node.channel() as channel:
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        before = Streams(node, inference, "http", "grpc")
        await before.began()

        # The pod is deleted: it is taken out of the Services while the hook runs, and those
        # who have not heard of it are still answered.
        hook = asyncio.create_task(node.pre_stop())
        await inference.Generate(
            request(prompt="Still", stopping={"max_tokens": 1}), metadata=node.metadata
        )
        assert await node.probe("readinessProbe")
        await hook
        late = Streams(node, inference, "http", "grpc")
        await late.began()
        node.terminate()
        while await node.probe("readinessProbe"):
            pass  # each probe is a call
        assert not any(task.done() for task in late.tasks), "readiness fails first"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference.Generate(request(prompt="Too late"), metadata=node.metadata)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(refused.value).reason

        grace = node.pod.spec["terminationGracePeriodSeconds"]
        ended, *reasons = await asyncio.gather(node.ended(grace), *before.tasks, *late.tasks)
    assert ended == 0
    assert reasons == ["length", "FINISH_REASON_LENGTH"] * 2
    assert [*before.tokens, *late.tokens] == [tokens_for(node)] * 4, "no stream lost a token"
