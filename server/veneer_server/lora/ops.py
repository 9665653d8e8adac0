"""The torch reference of batched LoRA: rows sorted by adapter, one pair of
products for each segment and group.

Never gathers A or B per row, and never multiplies rows by a mask: 0 x NaN is
NaN, so a mask would let one adapter's overflow into its neighbours' rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from veneer_server.lora.table import AdapterTable, Group

__all__ = ["Segment", "apply_lora"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of a step that share an adapter: ``begin <= row < end``."""

    begin: int
    end: int
    table: AdapterTable


def apply_lora(
    segments: tuple[Segment, ...], layer: int, group: Group, x: torch.Tensor, y: torch.Tensor
) -> None:
    """Add each segment's update to ``y`` in place.

    Args:
        x: [rows, fan_in], in the adapters' dtype.
        y: [rows, sum of fan_out of the group], in the adapters' dtype.
    """
    for segment in segments:
        views = segment.table.views[layer][group.value]
        if views is None:
            continue
        rows = y[segment.begin : segment.end]
        shrunk = torch.mm(x[segment.begin : segment.end], views.a_t)
        for expand in views.expands:
            rows[:, expand.columns].addmm_(
                shrunk[:, expand.ranks], expand.b_t, alpha=expand.scaling
            )
