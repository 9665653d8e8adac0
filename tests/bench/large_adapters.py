"""Measure the cost of adapters with a large rank, and their effect on other requests.

``python -m tests.bench.large_adapters``

On a real server with the bundled base, for the base and for adapters of the given ranks in all
modules: the engine's CPU time for a prompt token and for a token of rows that decode, then the
longest gap of a quiet stream of the base beside a prompt of 1,500 tokens and beside 16 callers
of 24 tokens each. `veneer_server.wire.requests.token_work` is based on the CPU times.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from veneer_proto.v1 import inference_pb2 as pb

from tests.adapter_files import write_adapter
from tests.places import cache_dir
from tests.server_harness import Server, running_server

HIDDEN, WIDE, KV, LAYERS = 576, 1536, 192, 30
"""Sizes of the bundled base."""
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, WIDE),
    "mlp.up_proj": (HIDDEN, WIDE),
    "mlp.down_proj": (WIDE, HIDDEN),
}
FLAGS = ("--device-adapter-bytes", "2GiB", "--max-adapter-bytes", "2GiB")
_DRAW = random.Random(1)


def write(folder: Path, rank: int) -> None:
    """Write an adapter with small random numbers in every module."""
    numbers = (np.random.default_rng(0).standard_normal(1 << 16) * 0.01).astype(np.float16)
    tensors = {}
    for layer in range(LAYERS):
        for module, (fan_in, fan_out) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = np.resize(numbers, (rank, fan_in))
            tensors[f"{name}.lora_B.weight"] = np.resize(numbers, (fan_out, rank))
    config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [module.split(".")[1] for module in SHAPES],
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    write_adapter(folder, config, tensors)


def ask(prompt: int, new: int, adapter: str) -> pb.GenerateRequest:
    """Build a request with random tokens, so that nothing is found in the prefix cache."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[_DRAW.randrange(1000, 40_000) for _ in range(prompt)]),
        adapter=adapter,
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=new, ignore_eos=True),
    )


async def generate(server: Server, count: int, *request: Any) -> None:
    await asyncio.gather(*(server.inference.Generate(ask(*request)) for _ in range(count)))


async def cpu_times(server: Server, adapter: str) -> str:
    """Measure the engine's CPU milliseconds per token."""

    async def of(count: int, prompt: int, new: int) -> float:
        began = sum(server.engine.cpu_times()[:2])
        await generate(server, count, prompt, new, adapter)
        return float(sum(server.engine.cpu_times()[:2]) - began) * 1e3

    prompt = await of(1, 400, 1) / 400
    rows = {count: await of(count, 2, 48) / 48 / count for count in (1, 8)}
    return (
        f"CPU: {prompt:.2f} ms a prompt token, {rows[1]:.2f} a token of one row, "
        f"{rows[8]:.2f} of eight"
    )


async def gaps(server: Server, adapter: str) -> str:
    """Measure the longest gap of a stream of the base beside the adapter's requests."""
    seen: list[float] = []
    calm = asyncio.Event()

    async def listen() -> None:
        last = time.perf_counter()
        async for _ in server.inference.GenerateStream(ask(8, 1500, "")):
            now = time.perf_counter()
            seen.append(now - last)
            last = now
            if len(seen) == 40:
                calm.set()

    listening = asyncio.create_task(listen())
    await calm.wait()
    told = []
    for what, request in (("a prompt", (1, 1500, 1)), ("16 callers", (16, 8, 24))):
        seen.clear()
        began = time.perf_counter()
        await generate(server, *request, adapter)
        took = time.perf_counter() - began
        told.append(f"{what}: {took:.1f} s, gap {max(seen) * 1e3:.0f} ms")
    listening.cancel()
    await asyncio.wait({listening})
    return ", ".join(told)


async def measure(ranks: list[int]) -> None:
    with tempfile.TemporaryDirectory() as work:
        async with running_server(Path(work) / "data", cache_dir(), *FLAGS) as server:
            for rank in [0, *ranks]:
                adapter = f"rank-{rank}" if rank else ""
                if rank:
                    write(Path(work) / adapter, rank)
                    await server.push(Path(work) / adapter, adapter)
                await generate(server, 1, 8, 1, adapter)  # loads it into memory
                print(f"{adapter or 'base'}: {await cpu_times(server, adapter)}", flush=True)
                print(f"{adapter or 'base'}: {await gaps(server, adapter)}", flush=True)
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="64,1024")
    given = parser.parse_args()
    asyncio.run(measure([int(rank) for rank in given.ranks.split(",")]))
