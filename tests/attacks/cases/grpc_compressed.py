"""Messages of some kilobytes that gzip expands to megabytes."""

from __future__ import annotations

import asyncio
import time

import grpc
from veneer_proto.v1 import inference_pb2

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome

TITLE = "compressed messages that grow to 4 MB and to 200 MB"
AT_ONCE = 12
FITS, TOO_LARGE = 4_000_000, 200_000_000
GENERATE = "/veneer.v1.InferenceService/Generate"


async def attack(target: Target) -> list[str]:
    """The limit on a message's size applies after decompression."""
    wrong: list[str] = []
    options = [("grpc.max_send_message_length", -1)]
    fits, large = (
        inference_pb2.GenerateRequest(prompt="a" * size).SerializeToString()
        for size in (FITS, TOO_LARGE)
    )
    async with grpc.aio.insecure_channel(
        target.grpc, options=options, compression=grpc.Compression.Gzip
    ) as channel:

        async def one() -> None:
            said = await grpc_outcome(channel, GENERATE, [fits])
            if said not in (
                "INVALID_ARGUMENT CONTEXT_TOO_LONG",
                "RESOURCE_EXHAUSTED QUEUE_FULL",
            ):
                wrong.append(f"4 MB: {said}")

        said = await grpc_outcome(channel, GENERATE, [large])
        if said != "RESOURCE_EXHAUSTED":
            wrong.append(f"200 MB: {said}")
        ends = time.monotonic() + target.seconds
        while True:
            await asyncio.gather(*(one() for _ in range(AT_ONCE)))
            if time.monotonic() >= ends:
                return wrong
