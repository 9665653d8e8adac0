"""Measure the cost of keys, TLS and limits for one tenant:
``python -m tests.bench.access_cost``.

In each round the real server is started without keys; with keys; with keys and TLS; and with
keys, TLS and limits that nobody reaches (every second round in reverse order). 32 streams run
on it, for the base and an adapter. Prints the CPU seconds per 1,000 tokens of the front
process, which bears all of the cost, and of all processes: median and range, and the ratio to
the server without keys in the same round. Processes of the same kind differ by 10 %, depending
on how their memory is laid out, so each is started anew.
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
from typing import ClassVar, Final

from veneer_client import AsyncClient, Text
from veneer_server.access.edit_keys import add_key

from tests.bench.start import ADAPTER, TEXT, cpu_of, own_cpu_of
from tests.pki import Pki
from tests.places import cache_dir
from tests.server_harness import Server, running_server

STREAMS: Final = 32
NEW_TOKENS: Final = 64
KINDS: Final = ("nothing", "keys", "keys, TLS", "keys, TLS, limits")
LIMITS: Final = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "running_requests": 1000,
    "waiting_requests": 1000,
}


@dataclass
class Served:
    """A server, and a client that it accepts."""

    server: Server
    client: AsyncClient
    thousands: ClassVar[float] = STREAMS * NEW_TOKENS / 1000

    async def cost(self, turn: int) -> tuple[float, float]:
        """Return the CPU seconds per 1,000 tokens of the front, and of all processes."""
        pid = self.server.process.pid
        before = own_cpu_of(pid), cpu_of(pid)
        tokens = sum(await asyncio.gather(*(self._stream(turn, n) for n in range(STREAMS))))
        assert tokens == STREAMS * NEW_TOKENS
        return (
            (own_cpu_of(pid) - before[0]) / self.thousands,
            (cpu_of(pid) - before[1]) / self.thousands,
        )

    async def _stream(self, turn: int, number: int) -> int:
        async with self.client.generate_stream(
            Text(f"Caller {number} asks for the {turn}th time. {TEXT}"),
            adapter="chat" if number % 2 else "",
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
        ) as stream:
            return sum([len(chunk.token_ids) async for chunk in stream])


async def serve(stack: AsyncExitStack, folder: Path, parts: str) -> Served:
    """Start a server with ``parts``: any of "keys", "TLS" and "limits"."""
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
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="veneer-access-") as work:
        for turn in range(rounds):
            for at, kind in enumerate(KINDS if turn % 2 else KINDS[::-1]):
                folder = Path(work) / f"{turn}-{at}"
                folder.mkdir()
                async with AsyncExitStack() as stack:
                    served = await serve(stack, folder, kind)
                    await served.cost(0)  # warms up
                    found[kind].append(await served.cost(1))
    for which, name in enumerate(("front", "all")):
        plain = [costs[which] for costs in found["nothing"]]
        for kind in KINDS:
            costs = [each[which] for each in found[kind]]
            ratios = [cost / without for cost, without in zip(costs, plain, strict=True)]
            print(
                f"{name:5} {kind:18} {shown(costs)} s  x {shown(ratios)}",
            )


def shown(values: list[float]) -> str:
    """Format the median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.access_cost", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(bench(parser.parse_args().rounds))
