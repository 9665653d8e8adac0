"""The torch reference of batched LoRA: rows sorted by adapter, one pair of products
for each segment and group.

Never gathers A or B per row, and never multiplies rows by a mask: 0 x NaN is NaN,
so a mask would let one adapter's overflow into its neighbours' rows.

On small models the products take microseconds, as does making a view of a tensor.
So inputs and outputs of a group live in buffers that all layers share, and a
step's views into them are made once (`LoraBatch`), not once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from veneer_server.lora.table import AdapterTable, Group

__all__ = ["LoraBatch", "LoraBuffers", "Segment"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of a step that share an adapter: ``begin <= row < end``."""

    begin: int
    end: int
    table: AdapterTable


class LoraBuffers:
    """Input and output of each group, [rows, features], grown to the largest step.

    Args:
        fan_in: features of a group's input.
        fan_out: features of each of its projections, in order.
    """

    def __init__(
        self,
        fan_in: dict[Group, int],
        fan_out: dict[Group, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.fan_in = fan_in
        self.fan_out = fan_out
        self._dtype = dtype
        self._device = device
        self._rows = 0
        self._x: list[torch.Tensor] = []
        self._y: list[torch.Tensor] = []

    def take(self, group: Group, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``rows`` rows of a group's input and output."""
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            self._x = [self._empty(self.fan_in[g]) for g in Group]
            self._y = [self._empty(sum(self.fan_out[g])) for g in Group]
        return self._x[group.value][:rows], self._y[group.value][:rows]

    def _empty(self, features: int) -> torch.Tensor:
        return torch.empty(self._rows, features, dtype=self._dtype, device=self._device)


@dataclass(slots=True)
class _Part:
    """A segment's views in one group.

    Attributes:
        x: [rows, fan_in].
        y: [rows, fan_out] of each projection.
        shrunk: ranks -> [rows, sum of ranks] and its columns by projection.
    """

    table: AdapterTable
    x: torch.Tensor
    y: tuple[torch.Tensor, ...]
    shrunk: dict[tuple[int, ...], tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = field(
        default_factory=dict
    )

    def scratch(self, ranks: tuple[int, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        found = self.shrunk.get(ranks)
        if found is None:
            whole = self.x.new_empty(self.x.shape[0], sum(ranks))
            found = self.shrunk[ranks] = (whole, torch.split(whole, list(ranks), dim=1))
        return found


class LoraBatch:
    """The adapters of one step; built once, applied for each layer and group.

    Attributes:
        rows_each: rows of a segment, on average.
    """

    def __init__(self, segments: tuple[Segment, ...], rows: int, buffers: LoraBuffers) -> None:
        self.rows_each = sum(s.end - s.begin for s in segments) // len(segments)
        buffers.take(Group.QKV, rows)
        pairs = [buffers.take(group, rows) for group in Group]
        self._x: list[torch.Tensor] = [x for x, _ in pairs]
        self._y: list[torch.Tensor] = [y for _, y in pairs]
        self._parts = [
            [
                _Part(
                    s.table,
                    x[s.begin : s.end],
                    torch.split(y[s.begin : s.end], list(columns), dim=1),
                )
                for s in segments
            ]
            for x, y, columns in zip(
                self._x, self._y, (buffers.fan_out[group] for group in Group), strict=True
            )
        ]

    def add(self, layer: int, group: Group, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` plus each segment's update; valid until the next layer's `add`.

        Args:
            x: [rows, fan_in].
            y: [rows, sum of fan_out of the group].
        """
        self._x[group.value].copy_(x)
        total = self._y[group.value]
        total.copy_(y)
        for part in self._parts[group.value]:
            views = part.table.views[layer][group.value]
            if views is None:
                continue
            whole, columns = part.scratch(views.ranks)
            torch.mm(part.x, views.a_t, out=whole)
            for expand, shrunk in zip(views.expands, columns, strict=True):
                part.y[expand.member].addmm_(shrunk, expand.b_t, alpha=expand.scaling)
        return total
