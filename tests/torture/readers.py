"""Start streams that are never read, beside one that is.

``python -m tests.torture.readers --count 200`` runs the full form against a new server and
prints the memory per stream, the p99 gap of the healthy stream beside them and alone, and when
the server closed them; a quick form is in ``tests/integration``.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
from veneer_proto.v1 import inference_pb2_grpc

from tests.places import cache_dir
from tests.server_harness import Server, request, running_server

# A large first message and a small window, so that a stream is stuck at its first message.
PROMPT = [100 + at for at in range(100)]
OUTPUT = {"logprobs": True, "echo": True, "top_logprobs": 20}
SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.use_local_subchannel_pool", 1),
]


@asynccontextmanager
async def streams(server: Server, count: int, *, new_tokens: int) -> AsyncIterator[list[Any]]:
    """Start calls that nobody reads, on a separate connection; cancel them at the end."""
    async with grpc.aio.insecure_channel(server.address, SMALL_WINDOW) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = request(
            token_ids=PROMPT,
            output=OUTPUT,
            stopping={"max_tokens": new_tokens, "ignore_eos": True},
        )
        calls = [stub.GenerateStream(asked) for _ in range(count)]
        yield calls
        for call in calls:
            call.cancel()


async def closed(server: Server) -> float:
    """Return how many calls the server has ended because nobody read them."""
    return (await server.metric("veneer_request_failures_total")).get('reason="ABORTED"', 0)


async def gaps(server: Server, new_tokens: int) -> list[float]:
    """Read one stream to its end without delay; return the seconds between its messages.

    A message has one token, or more if the front was late, and then there are fewer gaps.
    """
    stopping = {"max_tokens": new_tokens, "ignore_eos": True}
    times, tokens = [], 0
    asked = request(prompt="Go", stopping=stopping)
    async for message in server.inference.GenerateStream(asked):
        times.append(time.perf_counter())
        tokens += len(message.token_ids)
    assert tokens == new_tokens
    return [after - before for before, after in pairwise(times)]


def _front_bytes(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


async def _computed(server: Server) -> None:
    """Wait until the engine is idle; unread output is then in the front."""
    names = ("num_requests_running", "num_requests_waiting")
    while any([(await server.metric(f"veneer_{name}"))[""] for name in names]):
        pass  # each scrape takes a while, so the server can work between two of them


async def _main(count: int, limit: float, cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--max-running", "64", "--reader-limit", str(limit))
        async with running_server(Path(folder) / "data", cache, *flags) as server:
            await gaps(server, 16)
            alone = _p99(await gaps(server, 256))
            before = _front_bytes(server)
            async with streams(server, count, new_tokens=8) as calls:
                while not (await server.metric("veneer_num_requests_running"))[""]:
                    pass
                await _computed(server)
                began, early = time.perf_counter(), await closed(server)
                held = _front_bytes(server) - before
                beside = _p99(await gaps(server, 256))
                while await closed(server) < len(calls):
                    pass
                ended = time.perf_counter() - began
            print(
                f"{count} streams that nobody reads: {held / count / 1e6:.2f} MB a stream in "
                f"the front; {early:.0f} were closed when the last had been computed, all "
                f"{ended:.1f} s later (limit {limit:g} s without progress); p99 between "
                f"tokens of a healthy stream {beside * 1000:.0f} ms, alone "
                f"{alone * 1000:.0f} ms ({beside / alone:.2f} x)"
            )
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--limit", type=float, default=30.0, help="--reader-limit")
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    given = parser.parse_args()
    asyncio.run(_main(given.count, given.limit, given.cache_dir))
