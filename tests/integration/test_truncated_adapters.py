"""An adapter's file that is cut off on disk between its registration and its first load."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_proto.v1 import adapters_pb2

from tests.server_harness import Server, running_server
from tests.tiny_llama import SHAPES, make_lora, make_tiny_llama

pytestmark = pytest.mark.asyncio

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.push
async def test_a_file_that_is_cut_off_before_it_is_loaded(
    cache_dir: Path, tmp_path: Path
) -> None:
    """As docs/reliability.md has it: ADAPTER_CORRUPT for whoever asks, over both doors, until
    the same files are pushed again. Others are served meanwhile."""
    base = make_tiny_llama(tmp_path / "base", seed=1)
    other = make_lora(tmp_path / "other", seed=0, modules=tuple(SHAPES))
    whole = (other / WEIGHTS).stat().st_size
    left = {"nothing": 0, "in-length": 7, "in-header": 18, "half": whole // 2, "all": whole - 1}
    folders = {
        name: make_lora(tmp_path / name, seed=seed, modules=tuple(SHAPES))
        for seed, name in enumerate(left, 1)
    }
    data = tmp_path / "data"
    async with running_server(data, cache_dir, "--base", str(base)) as server:
        await server.push(other, "other")
        expected = (await server.generate(prompt="Hi", adapter="other")).token_ids
        for name, size in left.items():
            pushed = (await server.push(folders[name], name)).adapter
            os.truncate(data / "store" / "weights" / pushed.weights_digest / WEIGHTS, size)
            refused = await server.refused(server.generate(prompt="Hi", adapter=name))
            assert (refused.code, refused.reason) == ("DATA_LOSS", "ADAPTER_CORRUPT"), refused
            assert refused.metadata["weights_digest"] == pushed.weights_digest
            assert WEIGHTS in refused.metadata["why"]
            assert refused.retry_after_s is None, "the file does not grow again"
            assert str(tmp_path) not in str(refused), "paths are the operator's"
            await quarantined(server, name)
            refused = await server.refused(server.generate(prompt="Hi", adapter=name))
            assert (refused.code, refused.reason) == ("DATA_LOSS", "ADAPTER_CORRUPT"), refused
            assert refused.metadata["adapter"] == f"{name}@{pushed.revision[:12]}"
            status, error = await over_http(server, name)
            assert (status, error["code"]) == (500, "adapter_corrupt"), error
            assert name in error["message"]
            answer = await server.generate(prompt="Hi", adapter="other")
            assert answer.token_ids == expected
        for name, folder in folders.items():
            await server.push(folder, name)
            assert (await server.generate(prompt="Hi", adapter=name)).token_ids


async def quarantined(server: Server, name: str) -> None:
    """Ask until the damaged files have been put away; pytest's timeout is the limit."""
    asked, state = adapters_pb2.GetAdapterRequest(name=name), None
    while state != adapters_pb2.ADAPTER_STATE_QUARANTINED:
        state = (await server.adapters.GetAdapter(asked)).adapter.state
        await asyncio.sleep(0.01)


async def over_http(server: Server, name: str) -> tuple[int, dict[str, Any]]:
    asked = {"model": name, "prompt": "Hi", "max_tokens": 2}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        answer = await http.post(f"http://{server.openai}/v1/completions", json=asked)
    return answer.status_code, answer.json()["error"]
