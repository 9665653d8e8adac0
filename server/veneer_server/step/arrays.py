"""A step as plain arrays: the interface between scheduling and execution.

Every backend, torch or native, executes `StepArrays`. They are numpy arrays, so they have a C
layout and no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.step.adapter_table import AdapterTable


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step of R rows (tokens) of S sequences.

    Attributes:
        tokens: [R] int64 token ids; the rows of a sequence are adjacent.
        positions: [R] int64 position of each row in its sequence.
        slots: [R] int64 place of each row's K and V: block * block_size + offset.
        row_starts: [S + 1] int64; sequence s has rows row_starts[s] to row_starts[s + 1].
        contexts: [S] int64 number of the sequence's tokens in the cache after this step.
        block_tables: [S, B] int64 KV blocks in order, padded with block 0; also 0 for blocks
            that no layer's window reaches.
        segments: rows that share an adapter; rows in no segment have none.
        logit_rows: [L] int64 rows whose logits are needed.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    row_starts: NDArray[np.int64]
    contexts: NDArray[np.int64]
    block_tables: NDArray[np.int64]
    segments: tuple[Segment, ...]
    logit_rows: NDArray[np.int64]


class Backend(Protocol):
    """Executes a whole step in one call."""

    def execute(self, step: StepArrays) -> torch.Tensor:
        """Write the rows' K and V, and return logits [L, vocab] in float32. The caller may use
        them until the next step."""

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """For each row of the last `execute`'s logits, whether all values are finite."""

    def clear(self, blocks: list[int]) -> None:
        """Make these KV blocks finite again. Attention gives positions beyond a sequence's
        end the weight 0, and 0 x NaN is NaN: a NaN left in a block would reach the next
        sequence that gets the block."""


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """For each row of [rows, vocab], whether all values are finite."""
    # A sum is finite only if every term is; one pass and no mask.
    found: list[bool] = logits.sum(dim=-1).isfinite().tolist()
    return found


@dataclass(frozen=True, slots=True)
class Segment:
    """Adjacent rows of a step that share an adapter: ``begin <= row < end``."""

    begin: int
    end: int
    table: AdapterTable
