"""A resident adapter: one flat array (its run), laid out by `layout`, with a table of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from veneer_server.step.layout import MEMBERS, Group, Layout, Slot


@dataclass(frozen=True, slots=True)
class GroupViews:
    """Views of one group of one layer.

    Attributes:
        a_t: A transposed, [fan_in, sum of ranks]; paired: [fan_in / 2, sum of ranks, 2].
        expands: B transposed, [rank, fan_out], and the scaling, of each adapted projection.
        members: index of each adapted projection among the group's projections.
        ranks: rank of each adapted projection.
    """

    a_t: torch.Tensor
    expands: tuple[tuple[torch.Tensor, float], ...]
    members: tuple[int, ...]
    ranks: tuple[int, ...]


class AdapterTable:
    """Views of one adapter's run: ``table.views[group][layer]``, None if the adapter does not
    adapt any member of the group.

    Attributes:
        ranks: for each group, the largest sum of its ranks in any layer.
    """

    def __init__(self, layout: Layout, run: torch.Tensor) -> None:
        self.layout = layout
        self.run = run
        columns: list[list[GroupViews | None]] = [[None] * layout.num_layers for _ in Group]
        of_group = {p: group for group, members in MEMBERS.items() for p in members}
        grouped: dict[tuple[int, Group], list[Slot]] = {}
        for slot in layout.slots:
            key = (slot.module.layer, of_group[slot.module.projection])
            grouped.setdefault(key, []).append(slot)
        for (layer, group), slots in grouped.items():
            columns[group.value][layer] = _views(run, slots, paired=layout.paired)
        self.views: tuple[tuple[GroupViews | None, ...], ...] = tuple(map(tuple, columns))
        self.ranks = [max((sum(v.ranks) for v in c if v), default=0) for c in self.views]


def _views(run: torch.Tensor, slots: list[Slot], *, paired: bool) -> GroupViews:
    first = slots[0]
    fan_in, ranks = first.fan_in, first.a_stride
    a_t = run[first.a : first.a + fan_in * ranks]
    expands = []
    for slot in slots:
        b_shape = (slot.module.rank, slot.fan_out)
        b_t = run.as_strided(b_shape, (slot.fan_out, 1), slot.b)
        expands.append((b_t, slot.module.scaling))
    return GroupViews(
        a_t.view((fan_in // 2, ranks, 2) if paired else (fan_in, ranks)),
        tuple(expands),
        tuple(slot.member for slot in slots),
        tuple(slot.module.rank for slot in slots),
    )
