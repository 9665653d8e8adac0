"""Adapters of several sizes that come and go in the memory of a simulated card."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Final

import torch
from veneer_registry.adapter import LoraModule
from veneer_server.backends.cuda.memory import adapters as memory
from veneer_server.backends.cuda.memory.adapters import Adapters
from veneer_server.backends.cuda.memory.arena import Arena
from veneer_server.backends.cuda.memory.timeline import DeviceTimeline
from veneer_server.models.config import DecoderConfig, Projection
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.layout import Layout

from tests.gpu.engine.simulated import SimulatedDevice
from tests.planted import planted

LAYERS: Final = 8
CONFIG: Final = DecoderConfig(
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
ATTENTION: Final[tuple[Projection, ...]] = ("q_proj", "k_proj", "v_proj")
ALL: Final[tuple[Projection, ...]] = (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")
BYTES: Final = 32 << 20


def check(seed: str, loads: int) -> str:
    """Adapters come and go at random, and each finds a place whatever holes others have left:
    the engine evicts by bytes, so one without a place would cost another's room.

    Returns:
        What was done.

    Raises:
        NoPlace: the budget has bytes for an adapter, and it found no place.
    """
    random = Random(seed)
    device = SimulatedDevice(random)
    arena = Arena(
        device, CONFIG, blocks=2, block_size=32, adapter_bytes=BYTES, chunk_bytes=1 << 18
    )
    adapters = Adapters(
        device, DeviceTimeline(device), arena, CONFIG, slots=64, most_ranks=(96, 32, 64, 32)
    )
    kinds = [_layout(rank, part) for rank in (8, 16, 32) for part in (ATTENTION, ALL[:4], ALL)]
    runs = [torch.zeros(kind.length, dtype=torch.bfloat16) for kind in kinds]
    held: list[tuple[int, AdapterTable]] = []
    for _ in range(loads):
        kind = random.randrange(len(kinds))
        while sum(kinds[k].length for k, _ in held) + kinds[kind].length > BYTES // 2:
            adapters.release(held.pop(random.randrange(len(held)))[1])
        held.append((kind, adapters.place(kinds[kind], runs[kind])))
    device.drained("")
    return f"{loads} loads of {len(kinds)} sizes, {len(held)} there at the end"


def _layout(rank: int, targets: tuple[Projection, ...]) -> Layout:
    modules = [
        LoraModule(layer, target, rank, 1.0, "", "")
        for layer in range(LAYERS)
        for target in targets
    ]
    return Layout.of(modules, CONFIG.shapes, LAYERS)


PLANTED: Final = {
    "pieces are as large as a chunk only": partial(
        planted, memory, "(chunk, chunk // 4, chunk // 16, 0)", "(chunk,)"
    )
}
