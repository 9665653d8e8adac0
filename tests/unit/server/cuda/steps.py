"""Steps for a decoder."""

from __future__ import annotations

import numpy as np
from veneer_server.step.arrays import StepArrays


def step(parts: list[tuple[list[int], int, list[int]]], block_size: int = 16) -> StepArrays:
    """Rows of several sequences: (new tokens, start, blocks); all logits wanted. Processes
    that need no more import no transformers with it."""
    slots = [
        blocks[(start + i) // block_size] * block_size + (start + i) % block_size
        for new, start, blocks in parts
        for i in range(len(new))
    ]
    table = np.zeros((len(parts), max(len(blocks) for *_, blocks in parts)), np.int64)
    for row, (*_, blocks) in enumerate(parts):
        table[row, : len(blocks)] = blocks
    return StepArrays(
        tokens=np.array([token for new, *_ in parts for token in new]),
        positions=np.array([start + i for new, start, _ in parts for i in range(len(new))]),
        slots=np.array(slots),
        row_starts=np.cumsum([0] + [len(new) for new, *_ in parts]),
        contexts=np.array([start + len(new) for new, start, _ in parts]),
        block_tables=table,
        segments=(),
        logit_rows=np.arange(sum(len(new) for new, *_ in parts)),
    )
