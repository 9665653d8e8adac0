"""Decoders on simulated cards, adapters in memory, and steps to run on them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import torch
from veneer_registry.adapter import LoraModule
from veneer_server.backends.cuda.buckets import Sizes
from veneer_server.backends.cuda.decoder import CudaDecoder
from veneer_server.backends.cuda.weights import load
from veneer_server.models.config import DecoderConfig
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Segment, StepArrays
from veneer_server.step.layout import Layout

from tests.gpu.engine.simulated import SimulatedDevice
from tests.tiny_llama import make_tiny_llama

BLOCK_SIZE: Final = 32
MOST_RANK: Final = 32
SEQUENCES: Final = 8


@dataclass(frozen=True, slots=True)
class Card:
    """A decoder on a card of its own."""

    device: SimulatedDevice
    decoder: CudaDecoder


@contextmanager
def tiny_base() -> Iterator[Path]:
    """A folder with the tiny Llama."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_tiny_llama(Path(folder) / "base")


def card(base: Path, seed: str, instead: Any, **options: Any) -> Card:
    """A decoder of an NF4 base. ``options`` are of `CudaDecoder`."""
    device = SimulatedDevice(Random(seed), instead)
    weights: DecoderWeights = load(device, base, quantization="nf4")
    settings: dict[str, Any] = {
        "blocks": 40,
        "block_size": BLOCK_SIZE,
        "adapter_bytes": 1 << 18,
        "exact": False,
        "slots": 6,
        "most_rank": MOST_RANK,
        "chunk_bytes": 1 << 14,
    }
    sizes = Sizes(rows=128, sequences=SEQUENCES, context=512)
    return Card(device, CudaDecoder(device, weights, sizes, **(settings | options)))


def make_run(config: DecoderConfig, random: Random) -> tuple[Layout, torch.Tensor]:
    """An adapter of random ranks on random projections, some layers left out."""
    targets = random.sample(sorted(config.shapes), random.randint(1, len(config.shapes)))
    modules = [
        LoraModule(layer, target, random.choice((1, 4, 7, 16, MOST_RANK)), 0.5, "", "")
        for layer in range(config.num_layers)
        for target in targets
        if random.random() < 0.9
    ] or [LoraModule(0, "q_proj", 4, 0.5, "", "")]
    layout = Layout.of(modules, config.shapes, config.num_layers)
    generator = torch.Generator().manual_seed(random.getrandbits(48))
    run = torch.randn(layout.length, generator=generator) / 8
    return layout, run.bfloat16()


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's rows of a step."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    table: AdapterTable | None = None


def step_of(parts: Sequence[Part]) -> StepArrays:
    """Sequences in this order; those that share an adapter are adjacent."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    contexts = []
    segments: list[Segment] = []
    for part in parts:
        begin, end = part.start, part.start + len(part.tokens)
        tokens += part.tokens
        positions += range(begin, end)
        slots += [
            part.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for at in range(begin, end)
        ]
        contexts.append(end)
        first = starts[-1]
        starts.append(len(tokens))
        if part.table is None:
            continue
        if segments and segments[-1].end == first and segments[-1].table is part.table:
            first = segments.pop().begin
        segments.append(Segment(first, len(tokens), part.table))
    width = max(len(part.blocks) for part in parts)
    tables = [[*part.blocks, *[0] * (width - len(part.blocks))] for part in parts]

    def array(numbers: Any) -> Any:
        return np.array(numbers, dtype=np.int64)

    return StepArrays(
        array(tokens),
        array(positions),
        array(slots),
        array(starts),
        array(contexts),
        array(tables),
        tuple(segments),
        array(starts[1:]) - 1,
    )
