"""Measure the cost of following a registry on the same machine:
``python -m tests.bench.follower_cost``.

In each round the real server is started with ``--role all``, and as a follower
(``--role engine``) beside a registry; every second round in reverse order. 32 streams run on
it, for the base and an adapter. Prints the CPU seconds per 1,000 tokens of the server, of its
front process alone, and of the registry: median and range, and the ratio to ``--role all`` in
the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from veneer_client import AsyncClient

from tests.bench.access_cost import Served, shown
from tests.bench.start import ADAPTER, cpu_of
from tests.places import cache_dir
from tests.server_harness import Server, running_server

ROLES: Final = ("all", "engine")


async def serve(stack: AsyncExitStack, folder: Path, role: str) -> tuple[Served, Server | None]:
    """Start a server with this role, and for a follower also its registry."""
    flags: list[str] = ["--no-prefix-cache", "--role", role]
    registry = None
    if role == "engine":
        registry = await stack.enter_async_context(
            running_server(folder / "registry", cache_dir(), "--role", "registry")
        )
        flags += ["--registry", registry.address]
    server = await stack.enter_async_context(
        running_server(folder / "data", cache_dir(), *flags)
    )
    client = await stack.enter_async_context(AsyncClient(f"http://{server.address}"))
    await client.push(ADAPTER, "chat")
    await client.activate("chat")
    return Served(server, client), registry


async def bench(rounds: int) -> None:
    """Measure and print."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="veneer-follower-") as work:
        for turn in range(rounds):
            for at, role in enumerate(ROLES if turn % 2 else ROLES[::-1]):
                folder = Path(work) / f"{turn}-{at}"
                folder.mkdir()
                async with AsyncExitStack() as stack:
                    served, registry = await serve(stack, folder, role)
                    await served.cost(0)  # warms up
                    before = cpu_of(registry.process.pid) if registry else 0.0
                    front, whole = await served.cost(1)
                    found[f"front, {role}"].append(front)
                    found[f"server, {role}"].append(whole)
                    if registry:
                        used = cpu_of(registry.process.pid) - before
                        found["registry"].append(used / served.thousands)
    for what in ("front", "server"):
        alone = found[f"{what}, all"]
        for role in ROLES:
            costs = found[f"{what}, {role}"]
            ratios = [cost / without for cost, without in zip(costs, alone, strict=True)]
            print(f"{what:8} {role:8} {shown(costs)} s  x {shown(ratios)}")
    print(f"registry          {shown(found['registry'])} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.follower_cost", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(bench(parser.parse_args().rounds))
