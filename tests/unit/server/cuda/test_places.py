"""Adapters of several sizes that come and go in the memory of a simulated card."""

from __future__ import annotations

from random import Random

import pytest
import torch
from veneer_registry.adapter import LoraModule
from veneer_server.backends.cuda.memory.adapters import Adapters
from veneer_server.backends.cuda.memory.arena import Arena
from veneer_server.backends.cuda.memory.timeline import Timeline
from veneer_server.models.config import DecoderConfig, Projection
from veneer_server.step.layout import Layout

from tests.gpu.engine.simulated import SimulatedDevice

LAYERS = 8
CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1792,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=1,
    head_dim=128,
    rms_norm_eps=1e-5,
    context_length=512,
    eos_token_ids=(2,),
    windows=(None,) * LAYERS,
    qk_norm=False,
    tied_head=False,
    quantization=None,
)
"""An eighth of an 8B Llama."""
ATTENTION: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj")
ALL: tuple[Projection, ...] = (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")
BYTES = 32 << 20


def layout(rank: int, targets: tuple[Projection, ...]) -> Layout:
    modules = [
        LoraModule(layer, target, rank, 1.0, "", "")
        for layer in range(LAYERS)
        for target in targets
    ]
    return Layout.of(modules, CONFIG.shapes, LAYERS)


@pytest.mark.parametrize("seed", range(4))
def test_what_the_budget_has_bytes_for_finds_a_place(seed: int) -> None:
    """Whatever holes earlier ones have left. The engine evicts by bytes, so an adapter without
    a place would fail its requests."""
    random = Random(seed)
    device = SimulatedDevice(random)
    arena = Arena(
        device, CONFIG, blocks=2, block_size=32, adapter_bytes=BYTES, chunk_bytes=1 << 18
    )
    adapters = Adapters(
        *(device, Timeline(device), arena, CONFIG), slots=64, most_ranks=(96, 32, 64, 32)
    )
    kinds = [layout(rank, part) for rank in (8, 16, 32) for part in (ATTENTION, ALL[:4], ALL)]
    runs = [torch.zeros(kind.length, dtype=torch.bfloat16) for kind in kinds]
    held: list[tuple[int, object]] = []
    for _ in range(600):
        kind = random.randrange(len(kinds))
        while sum(kinds[k].length for k, _ in held) + kinds[kind].length > BYTES // 2:
            adapters.release(held.pop(random.randrange(len(held)))[1])
        held.append((kind, adapters.place(kinds[kind], runs[kind])))
    device.drained("")
