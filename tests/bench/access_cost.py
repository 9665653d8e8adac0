"""What keys, TLS and limits cost with one tenant: ``python -m tests.bench.access_cost``.

Starts the real server four times: without keys; with keys; with keys and TLS; with keys, TLS
and limits that nobody reaches. In turns, 32 streams run on each, for the base and an adapter.
Prints the CPU seconds of the server's processes for 1,000 tokens, median and range, and the
ratio to the server without keys, of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_client import AsyncClient, Text
from veneer_server.access.edit_keys import add_key

from tests.bench.start import ADAPTER, TEXT, cpu_of
from tests.pki import Pki
from tests.places import cache_dir
from tests.server_harness import Server, running_server

STREAMS: Final = 32
NEW_TOKENS: Final = 64
LIMITS: Final = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "running_requests": 1000,
    "waiting_requests": 1000,
}


@dataclass
class Served:
    """A server, and a client that it lets in."""

    server: Server
    client: AsyncClient

    async def cost(self, turn: int) -> float:
        """CPU seconds of the server's processes for 1,000 tokens."""
        before = cpu_of(self.server.process.pid)
        tokens = sum(await asyncio.gather(*(self._stream(turn, n) for n in range(STREAMS))))
        return (cpu_of(self.server.process.pid) - before) / tokens * 1000

    async def _stream(self, turn: int, number: int) -> int:
        async with self.client.generate_stream(
            Text(f"Caller {number} asks for the {turn}th time. {TEXT}"),
            adapter="chat" if number % 2 else "",
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
        ) as stream:
            return sum([len(chunk.token_ids) async for chunk in stream])


async def serve(stack: AsyncExitStack, folder: Path, parts: str) -> Served:
    """Start a server with these parts: of "keys", "TLS" and "limits"."""
    flags: list[str] = []
    login: dict[str, str] = {}
    if "keys" in parts:
        file = folder / "keys.toml"
        made = add_key(
            file,
            name="one",
            tenant="default",
            roles=["operator"],
            expires=None,
            limits=LIMITS if "limits" in parts else {},
        )
        flags += ["--keys-file", str(file)]
        login["api_key"] = made.key
    if "TLS" in parts:
        pki = Pki(folder / "pki")
        flags += ["--tls-cert", pki.cert, "--tls-key", pki.key]
        login["ca"] = pki.ca_file
    server = await stack.enter_async_context(
        running_server(folder / "data", cache_dir(), *flags, "--no-prefix-cache")
    )
    scheme = "https" if "TLS" in parts else "http"
    client = await stack.enter_async_context(
        AsyncClient(f"{scheme}://{server.address}", **login)
    )
    await client.push(ADAPTER, "chat", activate=True)
    return Served(server, client)


async def bench(rounds: int) -> None:
    """Measure and print."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-access-")))
        kinds = ("nothing", "keys", "keys, TLS", "keys, TLS, limits")
        servers = {}
        for at, kind in enumerate(kinds):
            folder = work / str(at)
            folder.mkdir()
            servers[kind] = await serve(stack, folder, kind)
        for turn in range(rounds + 1):
            for kind in kinds if turn % 2 else kinds[::-1]:
                cost = await servers[kind].cost(turn)
                if turn:  # the first round warms up
                    found[kind].append(cost)
    plain = found["nothing"]
    for kind, costs in found.items():
        ratios = [cost / without for cost, without in zip(costs, plain, strict=True)]
        print(
            f"{kind:18} {statistics.median(costs):.3f} s ({min(costs):.3f} to {max(costs):.3f})"
            f"  x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.access_cost", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(bench(parser.parse_args().rounds))
