"""A registry and its follower: whole front processes on real sockets, with fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer_proto.v1 import inference_pb2, server_pb2

from tests.scale.proxy import Proxy
from tests.unit.server.rpc.front_harness import Front, make_adapter, prompt, running


@dataclass
class Pair:
    """A registry, a follower of it, and the network between them."""

    registry: Front
    follower: Front
    proxy: Proxy
    folders: Path

    def adapter(self, seed: int) -> Path:
        folder = self.folders / str(seed)
        if not folder.exists():
            make_adapter(folder, seed=seed)
        return folder

    async def push(self, name: str, seed: int, **options: Any) -> Any:
        return await self.registry.push(self.adapter(seed), name, **options)

    async def facts(self) -> Any:
        info = await self.follower.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        return info.replication

    async def agreed(self) -> None:
        """Wait until the follower has all that the registry has."""

        async def agree() -> bool:
            info = await self.registry.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            facts = await self.facts()
            return facts.connected and facts.sequence == info.replication.sequence

        await until(agree)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds; pytest's timeout is the limit."""
    while not await holds():  # noqa: ASYNC110 - it waits for states that have no event
        await asyncio.sleep(0.01)


@asynccontextmanager
async def pair(
    base: Path, cache: Path, tmp: Path, registry: Mapping[str, str] | None = None, **flags: str
) -> AsyncIterator[Pair]:
    """Args:
    registry: flags of the registry.
    flags: of the follower.
    """
    async with (
        running(base, cache, tmp / "registry", **(registry or {})) as owner,
        Proxy(owner.addresses["grpc"]) as proxy,
        running(
            base,
            cache,
            tmp / "follower",
            role="engine",
            registry=proxy.address,
            **flags,
        ) as follower,
    ):
        yield Pair(owner, follower, proxy, tmp)
        proxy.heal()


async def generate(front: Front, adapter: str) -> Any:
    sampling = inference_pb2.SamplingOptions(seed=1)
    return await front.inference.Generate(prompt(adapter=adapter, sampling=sampling))


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)
