"""Prompts with as many bytes as could fit the context, but too many tokens. They are tokenized
in a separate lane, and small prompts beside them are answered."""

from __future__ import annotations

import asyncio
import time

import grpc
from veneer_proto.v1 import inference_pb2, server_pb2, server_pb2_grpc

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome

TITLE = "twelve prompts that must be tokenized to see that they are too long"

AT_ONCE = 12
TOKEN_BYTES = 60
"""A little less than the base's longest token, which has 81 bytes."""
GENERATE = "/veneer.v1.InferenceService/Generate"


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        about = server_pb2_grpc.ServerServiceStub(channel)
        info = await about.GetServerInfo(server_pb2.GetServerInfoRequest())
        size = min(info.context_length, info.budgets.kv_cache_tokens) * TOKEN_BYTES
        requests = [
            inference_pb2.GenerateRequest(prompt=(word * size)[:size]).SerializeToString()
            for word in ("word ", "x", "0 ", "?! ", "aAbBcC")
        ]

        async def one(at: int) -> None:
            said = await grpc_outcome(channel, GENERATE, [requests[at % len(requests)]])
            if said not in (
                "INVALID_ARGUMENT CONTEXT_TOO_LONG",
                "RESOURCE_EXHAUSTED QUEUE_FULL",
            ):
                wrong.append(f"prompt {at % len(requests)}: {said}")

        ends = time.monotonic() + target.seconds
        while True:
            await asyncio.gather(*(one(at) for at in range(AT_ONCE)))
            if time.monotonic() >= ends:
                return wrong
