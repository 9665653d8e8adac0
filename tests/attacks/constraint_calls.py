"""Shared by the attacks with constraints: send a constraint and judge the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from veneer_proto.v1 import inference_pb2 as pb
from veneer_proto.v1 import inference_pb2_grpc

from tests.attacks.hostile_constraints import Hostile
from tests.server_harness import refusal

ANSWER_S: Final = 60.0
"""Seconds after which an answer counts as missing."""


class Caller:
    """A caller with its own connection, by which the server tells callers apart."""

    def __init__(
        self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._metadata = metadata
        # The stubs are typed for synchronous channels.
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    async def ask(self, hostile: Hostile, *, tokens: int = 4, seed: int = 1) -> str:
        """Send a request; return "" if the answer is as documented, else the answer. Documented
        are text, INVALID_ARGUMENT that names the field, and QUEUE_FULL under load."""
        request = pb.GenerateRequest(
            prompt="A:",
            constraint=pb.Constraint(**{hostile.kind: hostile.text}),
            sampling=pb.SamplingOptions(temperature=1, seed=seed),
            stopping=pb.StoppingOptions(max_tokens=tokens),
        )
        try:
            await self.stub.Generate(request, timeout=ANSWER_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"no answer within {ANSWER_S:g} s: {hostile.text[:60]}"
            return _wrong(hostile, error)
        return ""


def _wrong(hostile: Hostile, error: grpc.aio.AioRpcError) -> str:
    try:
        refused = refusal(error)
    except AssertionError:
        return (
            f"{error.code().name} without a reason for {hostile.text[:60]}: {error.details()}"
        )
    field: Mapping[str, str] = refused.metadata
    named = field.get("field", "").startswith("constraint")
    if (refused.code == "INVALID_ARGUMENT" and named) or refused.reason == "QUEUE_FULL":
        return ""
    return f"{refused.code} {refused.reason} for {hostile.text[:60]}: {refused.message}"


@asynccontextmanager
async def caller(address: str) -> AsyncIterator[Caller]:
    """Open a connection that is not shared; yield a caller on it."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Caller(channel)


async def until_the_end(seconds: float, work: Any) -> list[str]:
    """Call ``work`` (no arguments, returns problems) repeatedly, at least once."""
    loop = asyncio.get_running_loop()
    end, problems = loop.time() + seconds, []
    while True:
        problems += [problem for problem in await work() if problem]
        if loop.time() >= end:
            return problems[:20]
