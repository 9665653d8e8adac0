"""Shared by the benchmarks of backends: the bundled base, random adapters, steps."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from veneer_registry.adapter import LoraModule
from veneer_registry.fingerprint import fingerprint_base
from veneer_server.adapters.pages import make_ready, map_pages, memory, place
from veneer_server.engine.execution.backend_choice import Chosen, choose
from veneer_server.models.config import DecoderConfig
from veneer_server.models.source import import_bundled
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Backend, Segment, StepArrays
from veneer_server.step.layout import Layout
from veneer_server.wire.messages import EngineConfig

from tests.places import cache_dir

REPOSITORY = Path(__file__).parents[2]
CACHE = cache_dir()
BLOCK = 16
"""Tokens per block of the KV cache."""
PROMPT = 40
ADAPTERS, RANK = 8, 16
ROWS = (1, 8, 32)
_WARM_UP = 4
"""Number of uncounted warm-up steps of a round."""


def load(
    name: str,
    threads: int,
    *,
    num_blocks: int,
    base: Path | None = None,
    instructions: str = "auto",
    int8_activations: bool = False,
) -> Chosen:
    """Load the bundled base, or the one in a folder, in NF4 for the backend ``name``: ``torch``
    or ``native``."""
    base = import_bundled(CACHE).path if base is None else base
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(CACHE),
        base_name=base.name,
        weights_fingerprint=fingerprint_base(base, cache_dir=CACHE).weights,
        backend=name,  # type: ignore[arg-type]
        threads=threads,
        native_instructions=instructions,  # type: ignore[arg-type]
        int8_activations=int8_activations and name == "native",
    )
    torch.set_num_threads(threads)
    chosen = choose(config, torch.device("cpu"), torch.bfloat16, num_blocks)
    # Write all blocks: untouched memory is one page of zeros, which stays in caches.
    chosen.backend.clear(list(range(num_blocks)))
    return chosen


def make_adapters(
    config: DecoderConfig, dtype: torch.dtype, *, paired: bool
) -> list[AdapterTable]:
    """Make `ADAPTERS` different adapters of rank `RANK` on all projections, with non-zero B.

    Args:
        paired: see `Layout`.
    """
    return [_adapter(config, dtype, seed, paired=paired) for seed in range(ADAPTERS)]


def _adapter(
    config: DecoderConfig, dtype: torch.dtype, seed: int, *, paired: bool
) -> AdapterTable:
    modules = [
        LoraModule(layer, projection, RANK, 2.0, "", "")
        for layer in range(config.num_layers)
        for projection in config.shapes
    ]
    layout = Layout.of(modules, config.shapes, config.num_layers, paired=paired)
    generator = torch.Generator().manual_seed(seed)
    run = 0.02 * torch.randn(layout.length, generator=generator)
    return AdapterTable(layout, _as_loaded(run.to(dtype), seed))


def _as_loaded(run: torch.Tensor, number: int) -> torch.Tensor:
    """Copy into memory like that of the server's loaders, as if other adapters came first."""
    begin = place(number, run.nbytes)
    size = begin + run.nbytes
    fd, ready = memory(size), 0
    try:
        while ready < size:
            ready = make_ready(fd, size, ready)
        copy = torch.frombuffer(map_pages(fd, size)[begin:], dtype=run.dtype)
    finally:
        os.close(fd)
    return copy.copy_(run)


def blocks_for(tokens: int) -> int:
    """Return the number of blocks for ``tokens`` tokens of a sequence."""
    return -(-tokens // BLOCK)


def make_step(
    sequences: int, start: int, new: int, tables: Sequence[AdapterTable], *, most: int
) -> StepArrays:
    """Make a step with ``new`` tokens per sequence from position ``start``; neighbouring
    sequences share an adapter.

    Args:
        tables: the sequences are split into equal parts, one per table; none: no adapters.
        most: maximum tokens of a sequence, which determines its number of blocks.
    """
    rng = np.random.default_rng(start)
    within = np.tile(np.arange(start, start + new), sequences)
    owner = np.repeat(np.arange(sequences), new)
    width = blocks_for(most)
    blocks = 1 + np.arange(sequences * width).reshape(sequences, width)
    edges = [sequences * i // max(1, len(tables)) * new for i in range(len(tables) + 1)]
    return StepArrays(
        tokens=rng.integers(10, 40_000, sequences * new),
        positions=within,
        slots=blocks[owner, within // BLOCK] * BLOCK + within % BLOCK,
        row_starts=np.arange(sequences + 1) * new,
        contexts=np.full(sequences, start + new),
        block_tables=blocks,
        segments=tuple(
            Segment(begin, end, table)
            for begin, end, table in zip(edges, edges[1:], tables, strict=False)
            if end > begin
        ),
        logit_rows=np.arange(1, sequences + 1) * new - 1,
    )


def run_round(backend: Backend, rows: int, new: int, tables: Sequence[AdapterTable]) -> float:
    """Run ``new`` decoding steps after `PROMPT` tokens per row; return the median seconds.

    Those tokens are never computed, since the time does not depend on the cache's content.
    """
    most = PROMPT + _WARM_UP + new
    times = []
    for at in range(PROMPT, most):
        step = make_step(rows, at, 1, tables, most=most)
        began = time.perf_counter()
        backend.execute(step)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM_UP:])
