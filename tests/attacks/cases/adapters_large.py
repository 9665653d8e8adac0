"""Prompts with an adapter of rank over a thousand: a step with as many of their tokens as of
other prompts' tokens took seconds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import numpy as np
from veneer_proto.v1 import inference_pb2

from tests.adapter_files import write_adapter
from tests.attacks.case import Bug, Target
from tests.server_harness import Server

TITLE = "prompts under an adapter of a rank past a thousand"
FLAGS = ("--device-adapter-bytes", "1GiB", "--max-adapter-bytes", "1GiB")
KEYS = True
LOADS = 1 << 30
WAITS = 10
"""Each step reads all of the adapter's matrices, several times as much as the 4-bit base, and a
new caller waits for two steps."""
BUG = Bug(
    "veneer_server.wire.requests",
    "if adapter is None or not base_parameters:",
    "if True:",
    process="engine",
)

HIDDEN, WIDE, LAYERS = 576, 1536, 30
"""Sizes of the bundled base."""
SHAPES: Final = {
    "gate_proj": (HIDDEN, WIDE),
    "up_proj": (HIDDEN, WIDE),
    "down_proj": (WIDE, HIDDEN),
}
CHUNK = 128 + 32
"""Maximum prompt tokens of a step that also decodes."""


async def attack(target: Target) -> list[str]:
    """While such a prompt is computed, another caller's stream gets a token in each step. The
    stream's tokens show whether the prompt's work was split into enough steps."""
    rank = target.rng.randint(768, 1280)
    folder = target.work / f"rank-{rank}"
    _write(folder, rank)
    callers = [
        Server(None, target.grpc, target.metrics, key=target.keys[key])  # type: ignore[arg-type]
        for key in ("team-a", "inference-b")
    ]
    hog, light = callers
    await hog.push(folder, "large")
    count = target.rng.randint(600, 900) if target.full else target.rng.randint(320, 420)
    stream = light.inference.GenerateStream(_request(8, 1500, target))
    tokens, computed = 0, asyncio.Event()

    async def listen() -> None:
        nonlocal tokens
        async for message in stream:
            tokens += len(message.token_ids)
            if computed.is_set():
                break

    listening = asyncio.create_task(listen())
    await hog.inference.Generate(_request(1, 1, target, "large"))  # loads it into memory
    before = tokens
    await hog.inference.Generate(_request(count, 1, target, "large"))
    steps = tokens - before
    computed.set()
    stream.cancel()
    await asyncio.wait({listening})
    for caller in callers:
        await caller.channel.close()
    # Each of its tokens is the work of at least three; half of that, since tokens come late.
    least = 3 * count / CHUNK / 2
    if steps < least:
        return [
            f"rank {rank}: {count} prompt tokens took {steps} steps, fewer than {least:.0f}: "
            "the others' streams waited meanwhile"
        ]
    return []


def _write(folder: Path, rank: int) -> None:
    numbers = (np.random.default_rng(rank).standard_normal(1 << 16) * 0.01).astype(np.float16)
    tensors = {}
    for layer in range(LAYERS):
        for name, (fan_in, fan_out) in SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{module}.lora_A.weight"] = np.resize(numbers, (rank, fan_in))
            tensors[f"{module}.lora_B.weight"] = np.resize(numbers, (fan_out, rank))
    config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(SHAPES),
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    write_adapter(folder, config, tensors)


def _request(
    prompt: int, new: int, target: Target, adapter: str = ""
) -> inference_pb2.GenerateRequest:
    ids = [target.rng.randrange(1000, 40_000) for _ in range(prompt)]
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids),
        adapter=adapter,
        sampling=inference_pb2.SamplingOptions(temperature=0),
        stopping=inference_pb2.StoppingOptions(max_tokens=new, ignore_eos=True),
    )
