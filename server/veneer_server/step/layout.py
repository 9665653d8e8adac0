"""The position of each matrix of an adapter in its run, one flat array of numbers. No torch:
loaders use it too.

The decoder computes projections in four groups that share an input (q, k, v;
o; gate, up; down). Within a group the A matrices lie side by side, transposed, so
that one GEMM shrinks the input for all of them. B is transposed too: on a few rows,
these GEMMs then read memory up to a third faster than in PEFT's layout. For kernels that
multiply pairs of neighbouring inputs, two rows of A transposed are interleaved (``paired``). No
rank, target list or number of adapters is fixed anywhere: the layout follows the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from veneer_registry.adapter import LoraModule, Projection


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
    """The positions of one module's matrices in the run, in elements from its start.

    Attributes:
        a: row i of A transposed, [fan_in, rank], begins at ``run[a + i * a_stride]``. Paired:
            ``run[a + i * 2 * a_stride + 2 * r + j]`` is for input 2 i + j and rank r.
        a_stride: the sum of its group's ranks.
        b: B transposed is ``run[b : b + rank * fan_out]``, shape [rank, fan_out].
        member: index of this projection among its group's.
    """

    module: LoraModule
    a: int
    a_stride: int
    b: int
    fan_in: int
    fan_out: int
    member: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of all modules in the run.

    Attributes:
        length: total length in elements.
        paired: see `Slot.a`.
    """

    slots: tuple[Slot, ...]
    length: int
    num_layers: int
    paired: bool = False

    @classmethod
    def of(
        cls,
        modules: Iterable[LoraModule],
        shapes: Mapping[Projection, tuple[int, int]],
        num_layers: int,
        *,
        paired: bool = False,
    ) -> Layout:
        """Lay out ``modules`` by layer and by group; in a group, first all A, then all B."""
        by_place: dict[tuple[int, Projection], LoraModule] = {
            (m.layer, m.projection): m for m in modules
        }
        slots: list[Slot] = []
        position = 0
        for layer in range(num_layers):
            for members in MEMBERS.values():
                present = [by_place[layer, p] for p in members if (layer, p) in by_place]
                fan_in = shapes[members[0]][1]
                ranks = sum(module.rank for module in present)
                a, b = position, position + ranks * fan_in
                for module in present:
                    fan_out = shapes[module.projection][0]
                    member = members.index(module.projection)
                    slots.append(Slot(module, a, ranks, b, fan_in, fan_out, member))
                    a += module.rank * (2 if paired else 1)
                    b += module.rank * fan_out
                position = b if present else position
        return cls(tuple(slots), position, num_layers, paired)
