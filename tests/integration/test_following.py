"""A registry and a follower as processes, on a tiny base, with a network that fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import adapters_pb2, inference_pb2, replication_pb2, server_pb2

from tests.scale.proxy import Proxy
from tests.server_harness import Server, running_server
from tests.tiny_llama import make_lora, make_tiny_llama

pytestmark = pytest.mark.push

SMALL = ("--kv-cache-bytes", "16MiB", "--host-cache-bytes", "64MiB")
SMALL += ("--device-adapter-bytes", "32MiB", "--threads", "1")


@dataclass
class Places:
    """What the tests' servers share."""

    base: Path
    cache: Path
    data: Path
    adapter: Path

    @asynccontextmanager
    async def registry(self, at: str = "127.0.0.1:0") -> AsyncIterator[Server]:
        flags = ("--base", str(self.base), "--role", "registry", "--listen", at)
        async with running_server(self.data / "registry", self.cache, *flags) as server:
            yield server

    @asynccontextmanager
    async def follower(self, proxy: Proxy) -> AsyncIterator[Server]:
        flags = ("--base", str(self.base), "--role", "engine", "--registry", proxy.address)
        async with running_server(self.data / "follower", self.cache, *flags, *SMALL) as server:
            yield server


@pytest.fixture
def places(tmp_path: Path, cache_dir: Path) -> Places:
    data = tmp_path / "data"
    data.mkdir()
    adapter = make_lora(tmp_path / "adapter", seed=1, rank=64)
    return Places(make_tiny_llama(tmp_path / "base"), cache_dir, data, adapter)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds; pytest's timeout is the limit."""
    while not await holds():  # noqa: ASYNC110 - another process's state
        await asyncio.sleep(0.01)


async def connected(server: Server) -> bool:
    info = await server.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    return bool(info.replication.connected)


async def test_a_follower_outlives_its_registry_and_a_kill_in_a_fetch(places: Places) -> None:
    everybody = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    async with Proxy("127.0.0.1:1") as proxy, places.registry() as registry:
        proxy.target = registry.address
        async with places.follower(proxy) as follower:
            pushed = await registry.push(places.adapter, "one", wait=everybody)
            assert (pushed.replicas.live, pushed.replicas.applied) == (1, 1)
            asked: dict[str, Any] = {"prompt": "One day", "adapter": "one"}
            first = await follower.generate(**asked)
            assert first.provenance.revision == pushed.adapter.revision
            assert first.provenance.tier == inference_pb2.TIER_REMOTE
            assert first.text != (await follower.generate(prompt="One day")).text

            # The registry dies: what is known is served, what is not is in doubt.
            registry.process.kill()
            await registry.process.wait()
            await until(lambda: _not(connected(follower)))
            assert (await follower.generate(**asked)).text == first.text
            refused = await follower.refused(follower.generate(prompt="One day", adapter="two"))
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "UNAVAILABLE")
            assert refused.retry_after_s
            async with places.registry() as again:
                proxy.target = again.address
                await until(lambda: connected(follower))
                await again.push(places.adapter, "two", wait=everybody)
                found = await follower.generate(prompt="One day", adapter="two")
                assert found.text == first.text  # the same weights, which were here
                assert found.provenance.tier != inference_pb2.TIER_REMOTE

                # The follower dies in the middle of a fetch, and resumes it.
                other = make_lora(places.data / "other", seed=2, rank=64)
                size = (other / "adapter_model.safetensors").stat().st_size
                await again.push(other, "three", wait=everybody)
                proxy.freeze_after(size // 2)
                asking = asyncio.ensure_future(
                    follower.generate(prompt="One day", adapter="three")
                )
                partial = places.data / "follower/follower/partial"
                await until(lambda: _has_bytes(partial))
                follower.process.kill()
                await follower.process.wait()
                await asyncio.gather(asking, return_exceptions=True)
                proxy.heal()
                fetched = proxy.forwarded
                async with places.follower(proxy) as restarted:
                    three = await restarted.generate(prompt="One day", adapter="three")
                    assert three.provenance.tier == inference_pb2.TIER_REMOTE
                    assert proxy.forwarded - fetched < size
                    kept = await restarted.generate(**asked)
                    assert kept.text == first.text
                    assert kept.provenance.tier != inference_pb2.TIER_REMOTE


async def test_an_upload_through_a_follower_is_in_its_memory_and_everywhere(
    places: Places,
) -> None:
    async with (
        places.registry() as registry,
        Proxy(registry.address) as proxy,
        places.follower(proxy) as follower,
    ):
        pushed = await follower.push(places.adapter, "one", activate=True)
        assert pushed.published
        assert not [each for each in pushed.warnings if "not loaded" in each]
        assert pushed.adapter.tier == inference_pb2.TIER_DEVICE
        found = await follower.generate(prompt="One day", adapter="one")
        assert found.provenance.tier == inference_pb2.TIER_DEVICE
        assert found.provenance.revision == pushed.adapter.revision
        asked = adapters_pb2.GetAdapterRequest(name="one")
        there = await registry.adapters.GetAdapter(asked)
        assert there.adapter.revision == pushed.adapter.revision
        refused = await registry.refused(registry.push(places.adapter, "two", activate=True))
        assert (refused.code, refused.metadata["role"]) == (
            "FAILED_PRECONDITION",
            "registry",
        )
        assert await registry.stop() == 0
        assert await follower.stop() == 0


async def _not(holds: Awaitable[bool]) -> bool:
    return not await holds


async def _has_bytes(folder: Path) -> bool:
    found = folder.glob("*/adapter_model.safetensors")  # noqa: ASYNC240 - a test's own loop
    return any(map(os.path.getsize, found))
