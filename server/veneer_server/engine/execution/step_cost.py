"""Measures, before serving and on the loaded base, how long a step takes on this machine.

The measurement has two uses. A step takes no more prompt tokens than fit into `STEP_SECONDS`,
so that other streams continue and pings are answered soon. And the supervisor knows how long
the longest step may take, so that it does not mistake a slow engine for a hung one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from veneer_server.engine.scheduling.step_limits import StepCost
from veneer_server.models.config import DecoderConfig
from veneer_server.step.arrays import Backend, StepArrays

_ROWS: Final = 8
_MORE_ROWS: Final = 64
"""Rows of the larger step that is timed: more of them where steps are short, since a token of a
large step may take longer than one of a small step, where memory is the limit."""
_SHORT_S: Final = 0.05
_SAMPLED_ROWS: Final = (1, 2, 4, 8, 16, 17, 32, 33, 48, 49, 64)
"""Rows of the steps that show what drafts cost, see `engine.scheduling.speculation`. Matrix
registers take 16 rows at a time, so that a row more than that costs much."""
_CONTEXT: Final = 2048
"""Context, in tokens, of the step that shows how long attention takes."""
_FROM_MEMORY: Final = 1.4
"""How many times longer attention takes in a real sequence. In the timed step, a few KV blocks
stand for all of the context, and their keys and values stay in the CPU's cache. Measured on an
Intel Xeon with AMX: 1.3 to 1.5 times."""


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
    *,
    block_size: int,
    blocks: int,
    threads: int,
    sampled: bool = False,
) -> StepCost:
    """Measure the cost of a step with a few small steps. They write to the first KV blocks,
    which are cleared afterwards.

    Args:
        blocks: number of KV blocks, the first of which is never used.
        threads: number of threads of a step; 0 if steps do not run on this CPU, so that only
            wall-clock time is meaningful.
        sampled: whether to measure `StepCost.sampled_s`, too.
    """
    usable = min(blocks - 1, -(-_MORE_ROWS // block_size))
    rows = min(_ROWS, usable * block_size, model.context_length - 1)

    def once(step: StepArrays) -> _Timed:
        began, worked = time.perf_counter(), time.process_time()
        backend.finite(backend.execute(step))  # waits for the device
        passed, worked = time.perf_counter() - began, time.process_time() - worked
        return _Timed(passed, min(passed, worked / threads) if threads else passed)

    def timed(rows: int, context: int = 0, *, all_logits: bool = False) -> _Timed:
        step = tokens_after(context, rows, block_size, usable)
        if all_logits:
            step = replace(step, logit_rows=np.arange(rows, dtype=np.int64))
        found = once(step)
        if found.passed >= _SHORT_S:
            return found
        # Cheap enough to repeat: the shortest had the cores for itself.
        least = min(found.passed, once(step).passed, once(step).passed)
        return _Timed(least, least)

    try:
        once(tokens_after(0, 1, block_size, usable))  # warm-up: touches all weights once
        one = timed(1)
        several = timed(rows)
        most = more = min(_MORE_ROWS, usable * block_size, model.context_length - 1)
        if several.passed < _SHORT_S and more > rows:
            rows, several = more, timed(more)
        context = min(_CONTEXT, model.context_length - rows)
        after = timed(rows, context)
        verified = [
            (count, timed(count, all_logits=True).passed)
            for count in (_SAMPLED_ROWS if sampled else ())
            if count <= most
        ]
    finally:
        backend.clear(list(range(1, usable + 1)))
    attention_s = max(0.0, after.alone - several.alone) / (rows * context)
    return StepCost(
        step_s=one.passed,
        token_s=max(0.0, several.alone - one.alone) / max(1, rows - 1),
        attention_s=attention_s * _FROM_MEMORY,
        sampled_s=tuple(verified),
    )


def tokens_after(context: int, rows: int, block_size: int, usable: int) -> StepArrays:
    """Return a step of one sequence with ``rows`` tokens after ``context`` earlier ones. The KV
    blocks from 1 to ``usable`` stand for all blocks of the sequence, in turns."""
    positions = np.arange(context, context + rows, dtype=np.int64)
    table = 1 + np.arange(-(-(context + rows) // block_size), dtype=np.int64) % usable
    return StepArrays(
        tokens=np.zeros(rows, dtype=np.int64),
        positions=positions,
        slots=table[positions // block_size] * block_size + positions % block_size,
        row_starts=np.array([0, rows], dtype=np.int64),
        contexts=np.array([context + rows], dtype=np.int64),
        block_tables=table[None, :],
        segments=(),
        logit_rows=np.array([rows - 1], dtype=np.int64),
    )
