"""Tenants on a real engine: own weights under one name, own copies of the same weights, and
what a killed engine or server leaves of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_server.access.edit_keys import add_key

from tests.server_harness import Server, read_files, request, running_server, upload_messages
from tests.tiny_llama import make_lora, make_tiny_llama

pytestmark = pytest.mark.push

FIRST, SECOND, OTHER = "first", "second", "other"
NAMES = ("", "chat", "twin")


class Caller:
    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self._metadata: Any = (("authorization", f"Bearer {key}"),)

    async def push(self, folder: Path, name: str) -> None:
        messages = upload_messages(read_files(folder), name)
        await self.server.adapters.UploadAdapter(messages, metadata=self._metadata)

    async def ask(self, rpc: str, **fields: Any) -> Any:
        message = getattr(adapters_pb2, f"{rpc}Request")(**fields)
        return await getattr(self.server.adapters, rpc)(message, metadata=self._metadata)

    async def generate(self, adapter: str) -> Any:
        """What an answer says, without times."""
        asked = request(
            prompt="The capital of France is",
            adapter=adapter,
            stopping={"max_tokens": 6, "ignore_eos": True},
            output={"logprobs": True},
        )
        answer = await self.server.inference.Generate(asked, metadata=self._metadata)
        place = answer.provenance
        return (
            list(answer.token_ids),
            [entry.logprob for entry in answer.logprobs],
            answer.usage.cached_prompt_tokens,
            (place.adapter, place.revision, place.tier),
        )

    async def tiers(self) -> dict[str, int]:
        listed = (await self.ask("ListAdapters")).adapters
        return {adapter.name: adapter.tier for adapter in listed}

    async def script(self) -> list[Any]:
        """Each name twice: cold and cached."""
        return [await self.generate(name) for name in (*NAMES, *NAMES)]


async def test_tenants_of_a_real_engine(cache_dir: Path, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    same, mine, theirs = (make_lora(tmp_path / str(n), seed=n, rank=4) for n in range(3))
    file, data = tmp_path / "keys.toml", tmp_path / "data"
    keys = {
        tenant: add_key(file, name=tenant, tenant=tenant, roles=["operator"], expires=None).key
        for tenant in (FIRST, SECOND, OTHER)
    }
    # Bit-identical whatever else is in a batch: answers are compared exactly.
    flags = ("--base", str(base), "--kv-cache-bytes", "16MiB")
    flags += ("--keys-file", str(file), "--exact")
    async with running_server(data, cache_dir, *flags) as server:
        first, second, other = (Caller(server, keys[each]) for each in keys)
        for caller in (first, second):
            await caller.push(mine, "chat")
            await caller.push(same, "twin")
        alone = await first.script()

        await other.push(theirs, "chat")
        await other.push(same, "twin")
        answer = await other.generate("chat")
        assert answer[0] != alone[1][0], "other weights under the same name"
        assert await second.tiers() == dict.fromkeys(("chat", "twin"), inference_pb2.TIER_DISK)
        busy = asyncio.ensure_future(_busy(other))
        beside = await second.script()
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        assert beside == alone

        tested = await second.ask("SelfTest", adapters=["chat", "twin"])
        assert tested.passed, str(tested)
        before = await second.tiers()
        await other.ask("EvictAdapter", name="twin", mode=3)
        assert await second.tiers() == before

        engine = server.engine
        engine.kill()
        await server.wait_for_health(False, 30)
        await server.wait_for_health(True, 60)
        await _until_resident(second, before)
        again = await second.generate("chat")
        assert again[:2] == alone[1][:2]
        server.process.kill()
        await server.process.wait()

    async with running_server(data, cache_dir, *flags) as server:
        second, other = (Caller(server, keys[each]) for each in (SECOND, OTHER))
        assert set(await second.tiers()) == {"chat", "twin"}
        assert (await second.generate("chat"))[:2] == alone[1][:2]
        assert (await other.generate("chat"))[:2] == answer[:2]


async def _busy(caller: Caller) -> None:
    """Traffic without an end, some of it on the same weights."""
    while True:
        await asyncio.gather(*(caller.generate(name) for name in (*NAMES, "twin")))


async def _until_resident(caller: Caller, wanted: dict[str, int]) -> None:
    """Restoring has no event for a caller: look until pytest's timeout."""
    while await caller.tiers() != wanted:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
