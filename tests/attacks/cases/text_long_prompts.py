"""Twelve concurrent prompts of 4 MB, over gRPC and HTTP, which could stop every stream for
27 s."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
from veneer_proto.v1 import inference_pb2

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome, http_answer

TITLE = "twelve prompts of 4 MB at once"

AT_ONCE = 12
SIZE = 4_000_000
GENERATE = "/veneer.v1.InferenceService/Generate"


def _texts() -> list[str]:
    return [
        ("word " * (SIZE // 5))[:SIZE],
        "a" * SIZE,
        "é" * (SIZE // 2),
        " " * SIZE,
        "\n" * SIZE,
        "🦆" * (SIZE // 4),
    ]


async def attack(target: Target) -> list[str]:
    """Each prompt exceeds the context and must be refused for that reason."""
    wrong: list[str] = []
    texts = _texts()
    requests = [
        inference_pb2.GenerateRequest(prompt=text).SerializeToString() for text in texts
    ]
    bodies = [
        json.dumps({"model": target.adapter, "prompt": text}, ensure_ascii=False).encode()
        for text in texts
    ]

    async def over_grpc(channel: grpc.aio.Channel, at: int) -> None:
        said = await grpc_outcome(channel, GENERATE, [requests[at % len(requests)]])
        if said not in ("INVALID_ARGUMENT CONTEXT_TOO_LONG", "RESOURCE_EXHAUSTED QUEUE_FULL"):
            wrong.append(f"gRPC, text {at % len(requests)}: {said}")

    async def over_http(at: int) -> None:
        status, answer = await http_answer(target.openai, post(bodies[at % len(bodies)]))
        if status not in (400, 413, 429):  # line breaks are longer in JSON
            wrong.append(f"HTTP, text {at % len(bodies)}: {status} {answer[:200]!r}")

    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(target.grpc, options=options) as channel:
        ends = time.monotonic() + target.seconds
        while True:
            await asyncio.gather(*(over_grpc(channel, at) for at in range(AT_ONCE)))
            await asyncio.gather(*(over_http(at) for at in range(AT_ONCE)))
            if time.monotonic() >= ends:
                return wrong


def post(body: bytes, path: str = "/v1/completions") -> bytes:
    """Build a request that closes its connection."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
