"""The torch reference of batched LoRA: rows sorted by adapter; for each segment and group one
GEMM by all As, then one by each B.

It never gathers A or B per row, and never multiplies rows by a mask: 0 x NaN is NaN,
so with a mask one adapter's overflow would reach its neighbours' rows.

On small models the GEMMs take microseconds, and so does making a view of a tensor.
So inputs and outputs of a group live in buffers that all layers share, and a
step's views into them are made once (`LoraBatch`), not once per layer.
"""

from __future__ import annotations

import torch

from veneer_server.step.adapter_table import GroupViews
from veneer_server.step.arrays import Segment
from veneer_server.step.layout import Group

__all__ = ["LoraBatch", "LoraBuffers", "Segment"]


class LoraBuffers:
    """Buffers for the input and output of each group, [rows, features], which grow to the
    largest step.

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
        """Return the first ``rows`` rows of a group's input and output buffer."""
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            self._x = [self._empty(self.fan_in[g]) for g in Group]
            self._y = [self._empty(sum(self.fan_out[g])) for g in Group]
        return self._x[group.value][:rows], self._y[group.value][:rows]

    def _empty(self, features: int) -> torch.Tensor:
        return torch.empty(self._rows, features, dtype=self._dtype, device=self._device)


class _Part:
    """A segment's views into one group's buffers.

    Attributes:
        views: the adapter's matrices, by layer.
        x: [rows, fan_in], the input.
        whole: [rows, sum of ranks], the shrunk input (x times all As).
        pairs: for each adapted projection, its columns of the output and of ``whole``.
    """

    __slots__ = ("_shape", "_y", "pairs", "views", "whole", "x")

    def __init__(
        self, views: tuple[GroupViews | None, ...], x: torch.Tensor, y: tuple[torch.Tensor, ...]
    ) -> None:
        self.views = views
        self.x = x
        self.whole = x
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._y = y
        self._shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def fit(self, views: GroupViews) -> None:
        """Allocate ``whole`` for a layer, if its ranks differ from the last layer's. Most
        adapters have the same ranks in every layer."""
        shape = (views.ranks, views.members)
        if shape == self._shape:
            return
        self._shape = shape
        self.whole = self.x.new_empty(self.x.shape[0], sum(views.ranks))
        columns = torch.split(self.whole, list(views.ranks), dim=1)
        self.pairs = [
            (self._y[member], shrunk)
            for member, shrunk in zip(views.members, columns, strict=True)
        ]


class LoraBatch:
    """The adapters of one step; built once, applied for each layer and group.

    Attributes:
        work: multiplications of the largest GEMM of each group.
    """

    def __init__(self, segments: tuple[Segment, ...], rows: int, buffers: LoraBuffers) -> None:
        self.work = [
            buffers.fan_in[group]
            * max((s.end - s.begin) * s.table.ranks[group.value] for s in segments)
            for group in Group
        ]
        buffers.take(Group.QKV, rows)
        pairs = [buffers.take(group, rows) for group in Group]
        self._x: list[torch.Tensor] = [x for x, _ in pairs]
        self._y: list[torch.Tensor] = [y for _, y in pairs]
        self._parts = [
            [
                _Part(
                    s.table.views[group.value],
                    x[s.begin : s.end],
                    torch.split(y[s.begin : s.end], list(buffers.fan_out[group]), dim=1),
                )
                for s in segments
            ]
            for group, x, y in zip(Group, self._x, self._y, strict=True)
        ]

    def add(self, layer: int, group: Group, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``y`` plus each segment's update. The result is valid until the next layer's
        `add`.

        Args:
            x: [rows, fan_in].
            y: [rows, sum of fan_out of the group].
        """
        self._x[group.value].copy_(x)
        total = self._y[group.value]
        total.copy_(y)
        mm = torch.mm
        for part in self._parts[group.value]:
            views = part.views[layer]
            if views is None:
                continue
            part.fit(views)
            mm(part.x, views.a_t, out=part.whole)
            for (target, shrunk), (b_t, scaling) in zip(part.pairs, views.expands, strict=True):
                target.addmm_(shrunk, b_t, alpha=scaling)
        return total
