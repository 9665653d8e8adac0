"""Steps of decoding by each backend, without a server: ``python -m tests.bench.backends``.

The bundled base in NF4, 1, 8 and 32 rows, a context of 40 to 104 tokens; plain, and with 8
different adapters of rank 16 on all projections mixed. Backends take turns, round by round, so
that a slow minute of the machine hits both; medians of all rounds, and ratios of those.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from veneer_registry.adapter import LoraModule
from veneer_server.engine.backends import Chosen, choose
from veneer_server.engine.messages import EngineConfig
from veneer_server.lora.batch import Segment
from veneer_server.lora.layout import Layout
from veneer_server.lora.table import AdapterTable
from veneer_server.models.arrays import StepArrays
from veneer_server.models.source import import_bundled

__all__: list[str] = []

REPOSITORY = Path(__file__).parents[2]
CACHE = Path(os.environ.get("VENEER_CACHE_DIR", REPOSITORY / ".cache" / "veneer"))
BLOCK = 16
PROMPT, NEW = 40, 64
BLOCKS = -(-(PROMPT + NEW) // BLOCK)
ADAPTERS, RANK = 8, 16


def _adapter(config: Any, dtype: torch.dtype, seed: int) -> AdapterTable:
    modules = [
        LoraModule(layer, projection, RANK, 2.0, "", "")
        for layer in range(config.num_layers)
        for projection in config.shapes
    ]
    layout = Layout.of(modules, config.shapes, config.num_layers)
    generator = torch.Generator().manual_seed(seed)
    run = 0.02 * torch.randn(layout.length, generator=generator)
    return AdapterTable(layout, run.to(dtype))


def _step(
    sequences: int, start: int, new: int, tables: Sequence[AdapterTable] | None
) -> StepArrays:
    """``new`` tokens each from position ``start`` on; neighbours share an adapter."""
    rng = np.random.default_rng(start)
    within = np.tile(np.arange(start, start + new), sequences)
    owner = np.repeat(np.arange(sequences), new)
    blocks = 1 + np.arange(sequences * BLOCKS).reshape(sequences, BLOCKS)
    segments = []
    if tables is not None:
        edges = [sequences * i // len(tables) * new for i in range(len(tables) + 1)]
        segments = [
            Segment(begin, end, table)
            for begin, end, table in zip(edges, edges[1:], tables, strict=False)
            if end > begin
        ]
    return StepArrays(
        tokens=rng.integers(10, 40_000, sequences * new),
        positions=within,
        slots=blocks[owner, within // BLOCK] * BLOCK + within % BLOCK,
        row_starts=np.arange(sequences + 1) * new,
        contexts=np.full(sequences, start + new),
        block_tables=blocks,
        segments=tuple(segments),
        logit_rows=np.arange(1, sequences + 1) * new - 1,
    )


def _round(chosen: Chosen, threads: int, rows: int, tables: Any) -> list[float]:
    """Seconds of each step."""
    torch.set_num_threads(threads)
    backend = chosen.backend
    backend.execute(_step(rows, 0, PROMPT, tables))
    times = []
    for at in range(PROMPT, PROMPT + NEW):
        step = _step(rows, at, 1, tables)
        began = time.perf_counter()
        backend.execute(step)
        times.append(time.perf_counter() - began)
    return times[4:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    backends = {}
    for name in ("torch", "native"):
        config = EngineConfig(
            base_folder=str(import_bundled(CACHE).path),
            cache_folder=str(CACHE),
            base_name="smollm2-135m",
            weights_fingerprint="bench-backends",
            backend=name,  # type: ignore[arg-type]
            threads=given.threads,
        )
        torch.set_num_threads(given.threads)
        backends[name] = choose(config, torch.device("cpu"), torch.bfloat16, 32 * BLOCKS + 1)
    model = backends["torch"].weights.config
    tables = {
        name: [_adapter(model, c.lora_dtype, seed) for seed in range(ADAPTERS)]
        for name, c in backends.items()
    }
    found: dict[str, Any] = {"threads": given.threads, "rounds": given.rounds, "rows": {}}
    for rows in (1, 8, 32):
        times: dict[tuple[str, bool], list[float]] = {}
        for number in range(given.rounds):
            order = list(backends) if number % 2 == 0 else list(backends)[::-1]
            for name in order:
                for mixed in (False, True):
                    own = times.setdefault((name, mixed), [])
                    # What is left to torch there runs on one thread, as when it serves.
                    count = 1 if name == "native" else given.threads
                    own += _round(
                        backends[name], count, rows, tables[name][:rows] if mixed else None
                    )
        speed = {key: rows / statistics.median(values) for key, values in times.items()}
        found["rows"][rows] = {
            **{
                f"{name} {'mixed' if mixed else 'base'}, tokens/s": round(value, 1)
                for (name, mixed), value in speed.items()
            },
            "native / torch, base": round(speed["native", False] / speed["torch", False], 2),
            "native / torch, mixed": round(speed["native", True] / speed["torch", True], 2),
            "native mixed / base": round(speed["native", True] / speed["native", False], 3),
        }
        if not given.json:
            print(
                f"{rows} rows",
                *(f"  {k}: {v}" for k, v in found["rows"][rows].items()),
                sep="\n",
            )
    if given.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
