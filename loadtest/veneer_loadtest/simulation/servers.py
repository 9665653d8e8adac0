"""Real servers on this machine, one core each, with the adapters of a scenario."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from veneer_client import AsyncClient, RetryPolicy, Tier
from veneer_client.local import LocalServer

from veneer_loadtest import setup, workload
from veneer_loadtest.cpus import during
from veneer_loadtest.errors import BadOption
from veneer_loadtest.server_metrics import read_counters


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        digests: weights digest of each adapter of the scenario, by number.
        adapter_bytes: size of an adapter's resident copy.
    """

    client: AsyncClient
    metrics: str
    digests: tuple[str, ...]
    adapter_bytes: int

    async def resident(self) -> frozenset[str]:
        """Return the weights digests of the adapters in memory."""
        found = self.client.list(name_prefix="load-", page_size=1000)
        return frozenset([a.weights_digest async for a in found if a.tier is not Tier.DISK])

    async def empty(self) -> None:
        """Evict all adapters from memory."""
        found = self.client.list(name_prefix="load-", page_size=1000)
        for each in [a.name async for a in found if a.tier is not Tier.DISK]:
            await self.client.evict(each)

    async def loads(self) -> int:
        """Return the number of loads from disk since the server started."""
        counters = await read_counters(self.metrics)
        return counters.by("adapter_load_seconds_count", "source", "stage").get("disk read", 0)


@asynccontextmanager
async def real_servers(
    cores: Sequence[int], *, adapters: int, in_memory: int, rank: int, seed: int
) -> AsyncIterator[list[Served]]:
    """Start a server on each core and publish the same adapters on all.

    Raises:
        BadOption: there is no base to serve.
        ServerUnreachable: a server did not start.
    """
    base = setup.find_base_folder(None)
    shape = workload.read_base_shape(base)
    size = 2 * rank * shape.layers * sum(map(sum, shape.projections().values()))
    budget = in_memory * size
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-sim-")))
        clients = []
        for core in cores:
            with during(frozenset({core})):
                flags = ["--base", str(base), "--threads", "1"]
                flags += ["--host-cache-bytes", str(budget)]
                flags += ["--device-adapter-bytes", str(budget)]
                server = await asyncio.to_thread(LocalServer, flags)
            stack.callback(server.stop)
            client = AsyncClient(server.url, timeout_s=120.0, retry=RetryPolicy(attempts=1))
            await stack.enter_async_context(client)
            clients.append((client, server.metrics_address))
        digests = []
        for number in range(adapters):
            name = workload.adapter_name(number)
            folder = workload.make_adapter(
                scratch / "adapter", shape, rank=rank, seed=workload.adapter_seed(seed, number)
            )
            for client, _ in clients:
                pushed = await client.push(folder, name)
            digests.append(pushed.adapter.weights_digest)
        yield [Served(client, at, tuple(digests), size) for client, at in clients]


def parse_cores(text: str) -> tuple[int, ...]:
    """Parse cores such as ``0,1``.

    Raises:
        BadOption: the text is something else.
    """
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise BadOption(
            f"--cores {text}: give a core for each server, such as 0,1",
            metadata={"field": "cores"},
        ) from error
