"""A resident adapter: one run of numbers with a table of views.

The decoder computes projections in four groups that share an input (q, k, v;
o; gate, up; down). Within a group the A matrices stand one below the other, so
one product shrinks the input for all of them. No rank, target list or number
of adapters is fixed anywhere: the table follows the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from veneer_registry.adapter import LoraModule, Projection

__all__ = ["MEMBERS", "AdapterTable", "Expand", "Group", "GroupViews", "Layout", "Slot"]


class Group(Enum):
    """Projections that share an input and, in the decoder, one fused linear."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3


MEMBERS: Final[Mapping[Group, tuple[Projection, ...]]] = {
    Group.QKV: ("q_proj", "k_proj", "v_proj"),
    Group.OUTPUT: ("o_proj",),
    Group.GATE_UP: ("gate_proj", "up_proj"),
    Group.DOWN: ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one module's matrices lie in the run, in numbers from its start.

    Attributes:
        a: A is ``run[a : a + rank * fan_in]``, shape [rank, fan_in].
        b: B is ``run[b : b + fan_out * rank]``, shape [fan_out, rank].
        member: index of this projection among its group's.
    """

    module: LoraModule
    a: int
    b: int
    fan_in: int
    fan_out: int
    member: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Order of all modules in the run; total length in numbers."""

    slots: tuple[Slot, ...]
    length: int
    num_layers: int

    @classmethod
    def of(
        cls,
        modules: Iterable[LoraModule],
        shapes: Mapping[Projection, tuple[int, int]],
        num_layers: int,
    ) -> Layout:
        """Lay out ``modules``: by layer, by group, first the As, then the Bs."""
        by_place: dict[tuple[int, Projection], LoraModule] = {
            (m.layer, m.projection): m for m in modules
        }
        slots: list[Slot] = []
        position = 0
        for layer in range(num_layers):
            for members in MEMBERS.values():
                present = [by_place[layer, p] for p in members if (layer, p) in by_place]
                starts_a, starts_b = [], []
                for module in present:
                    starts_a.append(position)
                    position += module.rank * shapes[module.projection][1]
                for module in present:
                    starts_b.append(position)
                    position += module.rank * shapes[module.projection][0]
                for module, a, b in zip(present, starts_a, starts_b, strict=True):
                    fan_out, fan_in = shapes[module.projection]
                    slots.append(
                        Slot(module, a, b, fan_in, fan_out, members.index(module.projection))
                    )
        return cls(tuple(slots), position, num_layers)


@dataclass(frozen=True, slots=True)
class Expand:
    """The second product of one projection.

    Attributes:
        member: index of the projection among its group's.
        b_t: [rank, fan_out], a transposed view.
    """

    member: int
    b_t: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class GroupViews:
    """One group of one layer.

    Attributes:
        a_t: [fan_in, sum of ranks], a transposed view.
        expands: one for each adapted projection.
        ranks: of each of them, in order.
    """

    a_t: torch.Tensor
    expands: tuple[Expand, ...]
    ranks: tuple[int, ...]


class AdapterTable:
    """Views of one adapter's run: ``table.views[layer][group]``, None where it
    does not adapt any member of the group."""

    def __init__(self, layout: Layout, run: torch.Tensor) -> None:
        self.run = run
        rows: list[list[GroupViews | None]] = [
            [None] * len(Group) for _ in range(layout.num_layers)
        ]
        of_group = {p: group for group, members in MEMBERS.items() for p in members}
        grouped: dict[tuple[int, Group], list[Slot]] = {}
        for slot in layout.slots:
            key = (slot.module.layer, of_group[slot.module.projection])
            grouped.setdefault(key, []).append(slot)
        for (layer, group), slots in grouped.items():
            rows[layer][group.value] = _views(run, slots)
        self.views: tuple[tuple[GroupViews | None, ...], ...] = tuple(map(tuple, rows))


def _views(run: torch.Tensor, slots: list[Slot]) -> GroupViews:
    fan_in = slots[0].fan_in
    total = sum(slot.module.rank for slot in slots)
    a = run[slots[0].a : slots[0].a + total * fan_in].view(total, fan_in)
    expands = []
    for slot in slots:
        b = run[slot.b : slot.b + slot.fan_out * slot.module.rank]
        expands.append(
            Expand(
                member=slot.member,
                b_t=b.view(slot.fan_out, slot.module.rank).t(),
                scaling=slot.module.scaling,
            )
        )
    return GroupViews(a.t(), tuple(expands), tuple(slot.module.rank for slot in slots))
