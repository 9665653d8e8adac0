"""Lists and maps with as many entries as fit in 4 MB, in every field that accepts them:
parsing 800,000 empty messages takes 5 s."""

from __future__ import annotations

import asyncio
import time

import grpc

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome
from tests.hostile.wire import length_delimited, tag, varint

TITLE = "requests of millions of empty entries"

SIZE = 4 << 20
INFERENCE = "/veneer.v1.InferenceService/Generate"
ADAPTERS = "/veneer.v1.AdapterService"


def _floods() -> list[tuple[str, str, bytes]]:
    def full(entry: bytes, *, within: int | None = None) -> bytes:
        data = entry * ((SIZE - 64) // len(entry))
        return data if within is None else length_delimited(within, data)

    entries = (
        length_delimited(5, length_delimited(1, b"k%d" % n) + length_delimited(2, b""))
        for n in range(300_000)
    )
    return [
        ("messages", INFERENCE, full(b"\x0a\x00", within=4)),
        ("stops", INFERENCE, b"\x1a\x01a" + full(b"\x12\x00", within=7)),
        ("biases", INFERENCE, b"\x1a\x01a" + full(b"\x4a\x00", within=6)),
        (
            "choices",
            INFERENCE,
            b"\x1a\x01a" + length_delimited(12, full(b"\x0a\x00", within=3)),
        ),
        ("adapters", INFERENCE, full(b"\x5a\x00")),
        (
            "ids, packed",
            INFERENCE,
            length_delimited(5, length_delimited(1, b"\x05" * (SIZE - 64))),
        ),
        ("ids, one by one", INFERENCE, full(b"\x08\x05", within=5)),
        ("prompts", INFERENCE, full(b"\x1a\x00")),
        ("groups", INFERENCE, full(tag(1000, 3) + tag(1000, 4))),
        ("labels", f"{ADAPTERS}/ListAdapters", b"".join(entries)[: SIZE - 64]),
        ("targets", f"{ADAPTERS}/SetAlias", full(b"\x1a\x00")),
        ("files", f"{ADAPTERS}/GetUpload", full(b"\x12\x00", within=2)),
        ("modules", "/veneer.v1.ServerService/PlanCapacity", full(b"\x12\x00", within=1)),
        ("names", f"{ADAPTERS}/SelfTest", full(length_delimited(1, varint(0)))),
    ]


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []
    floods = _floods()
    async with grpc.aio.insecure_channel(target.grpc) as channel:

        async def one(name: str, path: str, data: bytes) -> None:
            said = await grpc_outcome(channel, path, [data])
            slow = said == "RESOURCE_EXHAUSTED QUEUE_FULL"  # sent slowly, others waited
            if not slow and (said.partition(" ")[0] != "INVALID_ARGUMENT" or " " not in said):
                wrong.append(f"{name}: {said}")

        ends = time.monotonic() + target.seconds
        while True:
            await asyncio.gather(*(one(*flood) for flood in floods))
            if time.monotonic() >= ends:
                return sorted(set(wrong))
