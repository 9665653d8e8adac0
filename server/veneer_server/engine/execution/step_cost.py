"""Measures, before serving and on the loaded base, how long a step takes on this machine.

The measurement has two uses. A step takes no more prompt tokens than fit into `STEP_SECONDS`,
so that other streams continue and pings are answered soon. And the supervisor knows how long
the longest step may take, so that it does not mistake a slow engine for a hung one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from veneer_server.engine.scheduling.step_limits import StepCost
from veneer_server.models.config import DecoderConfig
from veneer_server.step.arrays import Backend, StepArrays

_ROWS: Final = 8
"""Rows of the larger step that is timed."""
_ATTENTION_FACTOR: Final = 2.0
"""How many times longer attention over a context takes per operation than the GEMMs with the
weights, which use every loaded number for many rows."""


@dataclass(frozen=True, slots=True)
class _Timed:
    """Timing of one step.

    Attributes:
        passed: wall-clock seconds.
        alone: estimate of them if nothing else had used the cores.
    """

    passed: float
    alone: float


@torch.inference_mode()
def measure(
    backend: Backend,
    model: DecoderConfig,
    parameters: int,
    *,
    block_size: int,
    threads: int,
) -> StepCost:
    """Measure the cost of a step with three small steps. They write to KV block 1, which is
    cleared afterwards.

    Args:
        parameters: number of parameters of the base.
        threads: number of threads of a step; 0 if steps do not run on this CPU, so that only
            wall-clock time is meaningful.
    """
    rows = min(_ROWS, block_size)
    try:
        _time(backend, 1, block_size, threads)  # warm-up: touches all weights once
        one = _time(backend, 1, block_size, threads)
        several = _time(backend, rows, block_size, threads)
    finally:
        backend.clear([1])
    token_s = max(0.0, several.alone - one.alone) / max(1, rows - 1)
    operations = 4 * model.num_layers * model.num_heads * model.head_dim
    return StepCost(
        step_s=one.passed,
        token_s=token_s,
        attention_s=_ATTENTION_FACTOR * token_s * operations / (2 * parameters),
    )


def _time(backend: Backend, rows: int, block_size: int, threads: int) -> _Timed:
    step = first_tokens(rows, block_size)
    began, worked = time.perf_counter(), time.process_time()
    backend.finite(backend.execute(step))  # waits for the device
    passed, worked = time.perf_counter() - began, time.process_time() - worked
    return _Timed(passed, min(passed, worked / threads) if threads else passed)


def first_tokens(rows: int, block_size: int) -> StepArrays:
    """Return a step of one sequence of ``rows`` tokens, in KV block 1."""
    places = np.arange(rows, dtype=np.int64)
    return StepArrays(
        tokens=np.zeros(rows, dtype=np.int64),
        positions=places,
        slots=block_size + places,
        row_starts=np.array([0, rows], dtype=np.int64),
        contexts=np.array([rows], dtype=np.int64),
        block_tables=np.array([[1]], dtype=np.int64),
        segments=(),
        logit_rows=np.array([rows - 1], dtype=np.int64),
    )
