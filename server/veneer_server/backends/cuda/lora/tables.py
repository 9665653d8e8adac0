"""Tables in which the kernels look up adapters and rows, so that launches need no addresses.

A captured graph replays its launches with the same pointers. So all adapters lie in one arena;
a swap writes new offsets into `AdapterSlots`, and a batch writes new `tiles`.

Layouts (contiguous, last index fastest):
    arena      [elements] bfloat16. Holds an adapter's As of a group, transposed: [fan_in,
               ranks], where ``ranks`` is the sum over the group's members; and the B of each
               member, transposed: [rank, fan_out]. Both as in `veneer_server.step.layout`.
    places     [slots, 2 + 3 * members] int64: A's offset, ``ranks``; then for each member
               B's offset, its rank (0: not adapted), the first of its columns of A.
    scalings   [slots, members] float32.
    tiles      [tiles, 3] int32: first row, number of rows (0: an unused tile), slot. All rows
               of a tile have the adapter in that slot.
    columns    [blocks, 5] int32: member, its features, the block's first column in the member's
               output, in the group's output, number of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch

FIRST_MEMBER: Final = 2
MEMBER_FIELDS: Final = 3


def fields(members: int) -> int:
    """Number of columns of ``places``."""
    return FIRST_MEMBER + MEMBER_FIELDS * members


class AdapterSlots:
    """The tables of one group in one layer: where each slot's adapter is.

    Args:
        fan_outs: features of each member's output.

    Attributes:
        places, scalings: see the module's docstring.
    """

    def __init__(
        self, slots: int, fan_in: int, fan_outs: Sequence[int], device: torch.device
    ) -> None:
        self.fan_in = fan_in
        self.fan_outs = tuple(fan_outs)
        width = fields(len(self.fan_outs))
        self.places = torch.zeros(slots, width, dtype=torch.int64, device=device)
        self.scalings = torch.zeros(
            slots, len(self.fan_outs), dtype=torch.float32, device=device
        )

    @classmethod
    def over(
        cls,
        places: torch.Tensor,
        scalings: torch.Tensor,
        fan_in: int,
        fan_outs: Sequence[int],
    ) -> AdapterSlots:
        """Make `AdapterSlots` over existing tables."""
        made = cls(0, fan_in, fan_outs, places.device)
        made.places, made.scalings = places, scalings
        return made

    def put(
        self,
        slot: int,
        a: int,
        members: Iterable[tuple[int, int, int, float]],
    ) -> None:
        """Fill a slot.

        Args:
            a: A's offset in the arena, in elements.
            members: for each adapted member, in the order of A's columns: its index, its rank,
                B's offset, its scaling.
        """
        row, scalings = place_row(len(self.fan_outs), a, members)
        self.places[slot] = torch.tensor(row)
        self.scalings[slot] = torch.tensor(scalings)


def place_row(
    members: int, a: int, adapted: Iterable[tuple[int, int, int, float]]
) -> tuple[list[int], list[float]]:
    """Return an adapter's rows of ``places`` and ``scalings``; see `AdapterSlots.put`.

    Args:
        members: number of members of the group.
    """
    row = [0] * fields(members)
    scalings = [0.0] * members
    row[0] = a
    for member, rank, b, scaling in adapted:
        start = FIRST_MEMBER + MEMBER_FIELDS * member
        row[start : start + MEMBER_FIELDS] = [b, rank, row[1]]
        row[1] += rank
        scalings[member] = scaling
    return row, scalings


def tile_table(
    segments: Iterable[tuple[int, int, int]], rows: int, tiles: int, device: torch.device
) -> torch.Tensor:
    """Cut segments into tiles of at most ``rows`` rows: [tiles, 3], padded with unused tiles.

    Args:
        segments: tuples of first row, one past the last row, slot.

    Raises:
        ValueError: more than ``tiles`` tiles are needed.
    """
    cut = [
        (row, min(rows, end - row), slot)
        for begin, end, slot in segments
        for row in range(begin, end, rows)
    ]
    if len(cut) > tiles:
        raise ValueError(f"{len(cut)} tiles, more than the launch's {tiles}")
    cut += [(0, 0, 0)] * (tiles - len(cut))
    return torch.tensor(cut, dtype=torch.int32, device=device).view(tiles, 3)


def column_table(fan_outs: Sequence[int], block: int, device: torch.device) -> torch.Tensor:
    """Cut each member's columns into blocks of at most ``block``: [blocks, 5]."""
    blocks, before = [], 0
    for member, fan_out in enumerate(fan_outs):
        blocks += [
            (member, fan_out, column, before + column, min(block, fan_out - column))
            for column in range(0, fan_out, block)
        ]
        before += fan_out
    return torch.tensor(blocks, dtype=torch.int32, device=device)
