"""Copies adapters into the arena, and assigns them memory and slots.

A launch finds an adapter by its slot, in tables of offsets whose addresses never change
(`lora.tables`). So a captured graph stays valid whatever is swapped. A swap copies matrices on
the stream for copies. The first step that uses the adapter writes its rows of the tables
beforehand, on the stream for steps.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from veneer_registry.errors import AdapterBudgetExceeded

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.lora.tables import AdapterSlots, fields, place_row
from veneer_server.backends.cuda.memory.arena import Arena
from veneer_server.backends.cuda.memory.fencing import DeviceStream
from veneer_server.backends.cuda.memory.timeline import DeviceTimeline
from veneer_server.backends.parallel.adapters import cut_layout, cut_run
from veneer_server.backends.parallel.peers import Member
from veneer_server.models.config import DecoderConfig
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.inbox import NoSlot
from veneer_server.step.layout import MEMBERS, Group, Layout, Slot

COPY_BYTES: Final = 8 << 20
"""Most bytes of one copy, so that copies and steps take turns on the bus to the device."""


@dataclass(eq=False, slots=True)
class _Placed:
    """An adapter in the arena.

    Attributes:
        pieces: first unit and number of units of each piece.
        rows: for each group, its rows of ``places``, [layers, fields] int64, and of
            ``scalings``, [layers, members] float32.
        slot: None until a step uses the adapter.
    """

    pieces: list[tuple[int, int]]
    rows: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
    slot: int | None = None


class Adapters:
    """All adapters in device memory, by their `AdapterTable`.

    Args:
        slots: most adapters at once.
        most_ranks: for each group, the largest sum of an adapter's ranks.
        member: this process's place among the others, if it has a part of each adapter.

    Attributes:
        places: the kernels' tables, by group and layer.
    """

    def __init__(
        self,
        device: Device,
        timeline: DeviceTimeline,
        arena: Arena,
        config: DecoderConfig,
        *,
        slots: int,
        most_ranks: Sequence[int],
        member: Member | None = None,
    ) -> None:
        self._member = member
        self._device = device
        self._timeline = timeline
        self._arena = arena
        self._most_ranks = tuple(most_ranks)
        self._placed: weakref.WeakKeyDictionary[AdapterTable, _Placed] = (
            weakref.WeakKeyDictionary()
        )
        self._count = 0
        self._slots = slots
        self._free = list(range(slots - 1, -1, -1))
        layers = config.num_layers
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pinned memory from which one adapter's rows are copied into the tables."""
        self.places: list[list[AdapterSlots]] = []
        for members in MEMBERS.values():
            width, fan_in = fields(len(members)), config.shapes[members[0]][1]
            of = (layers, slots, width), (layers, slots, len(members))
            kinds = torch.int64, torch.float32
            tables = tuple(device.empty(*s, dtype=k) for s, k in zip(of, kinds, strict=True))
            staged = tuple(
                device.pinned(layers, s[2], dtype=k) for s, k in zip(of, kinds, strict=True)
            )
            for table in tables:
                device.call(torch.Tensor.zero_, table)
            self._tables.append((tables[0], tables[1]))
            self._staged.append((staged[0], staged[1]))
            outs = [config.shapes[member][0] for member in members]
            self.places.append(
                [
                    AdapterSlots.over(tables[0][at], tables[1][at], fan_in, outs)
                    for at in range(layers)
                ]
            )

    def place(self, layout: Layout, run: torch.Tensor) -> AdapterTable:
        """Copy an adapter into the arena, and wait until the copy is done. Not for the thread
        that executes steps.

        Args:
            run: the adapter's numbers, bfloat16 in pinned memory.

        Returns:
            A table for `Segment`. Its run has no data (meta device).

        Raises:
            AdapterBudgetExceeded: its ranks are too large.
            NoSlot: it does not fit beside the others.
        """
        if (member := self._member) is not None:
            layout, run = cut_run(layout, run, member.whole, member.shard)
        table = AdapterTable(layout, torch.empty(layout.length, device="meta"))
        for ranks, most in zip(table.ranks, self._most_ranks, strict=True):
            if ranks > most:
                raise AdapterBudgetExceeded(
                    f"the adapter's ranks add up to {ranks} in one group of projections, but "
                    f"this backend supports at most {most}; serve it with --backend torch"
                )
        unit = self._arena.unit
        with self._timeline.lock:
            found = self._find_places(layout)
            if found is None:
                raise NoSlot(
                    "no contiguous room for the adapter in device memory (fragmentation); "
                    "unpin one of them, or start the server with a larger "
                    "--device-adapter-bytes"
                )
            self._count += 1
        ends, pieces = found
        begins, firsts = [0, *ends[:-1]], [first for first, _ in pieces]
        placed = _Placed(pieces, _rows(layout, begins, [f * unit for f in firsts]))
        source = object()
        most = COPY_BYTES // run.itemsize
        for begin, end, piece in zip(begins, ends, pieces, strict=True):
            for at in range(begin, end, most):
                last = min(at + most, end)
                to = piece[0] * unit + at - begin
                self._timeline.allow_copy((last - at) * run.itemsize)
                regions = [*self._arena.pool.chunks_of([piece]), source]
                with self._timeline.operation(DeviceStream.COPIES, regions):
                    target = self._arena.numbers[to : to + last - at]
                    self._device.call(target.copy_, run[at:last], non_blocking=True)
        self._timeline.until_free(source)
        self._timeline.forget(source)
        with self._timeline.lock:
            self._placed[table] = placed
        return table

    def _find_places(self, layout: Layout) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Take memory for an adapter in few large pieces or, failing that, in smaller ones.
        Returns where pieces end in the run, and their first unit and number of units. None if
        there is no room even with each matrix as a piece of its own, or no slot."""
        if self._count == self._slots:
            return None
        unit = self._arena.unit
        chunk = self._arena.pool.units * unit
        for most in (chunk, chunk // 4, chunk // 16, 0):
            ends = _pieces(layout, most)
            begins = [0, *ends[:-1]]
            sizes = [-(-(end - begin) // unit) for begin, end in zip(begins, ends, strict=True)]
            firsts = self._arena.pool.take(sizes)
            if firsts is not None:
                return ends, list(zip(firsts, sizes, strict=True))
        return None

    def part(self, layout: Layout) -> int:
        """See `Placer.part`."""
        member = self._member
        return 0 if member is None else cut_layout(layout, member.whole, member.shard).length

    def release(self, table: AdapterTable) -> None:
        """Free an adapter's memory and slot. Enqueued steps may still use it, later ones must
        not."""
        with self._timeline.lock:
            placed = self._placed.pop(table)
            self._arena.pool.give(placed.pieces)
            self._count -= 1
            if placed.slot is not None:
                self._free.append(placed.slot)

    def chunks(self, table: AdapterTable) -> list[int]:
        """Return an adapter's chunks: the regions that a step must name if it uses it."""
        return self._arena.pool.chunks_of(self._placed[table].pieces)

    def slot(self, table: AdapterTable) -> int:
        """Return an adapter's slot. If it has none yet, it gets one, and the copies of its rows
        into the tables are enqueued on the stream for steps."""
        placed = self._placed[table]
        if placed.slot is None:
            placed.slot = self._free.pop()
            for new, staged, tables in zip(
                placed.rows, self._staged, self._tables, strict=True
            ):
                for numbers, pinned, target in zip(new, staged, tables, strict=True):
                    self._timeline.until_free(("rows", id(pinned)))
                    pinned.numpy()[:] = numbers
                    to = target[:, placed.slot]
                    with self._timeline.operation(DeviceStream.STEPS, [("rows", id(pinned))]):
                        self._device.call(to.copy_, pinned, non_blocking=True)
        return placed.slot


def _groups(layout: Layout) -> dict[tuple[Group, int], list[Slot]]:
    """Return the adapted projections of each group and layer, in the order of A's columns."""
    group_of = {p: group for group, members in MEMBERS.items() for p in members}
    found: dict[tuple[Group, int], list[Slot]] = {}
    for slot in layout.slots:
        found.setdefault((group_of[slot.module.projection], slot.module.layer), []).append(slot)
    return found


def _matrices(layout: Layout) -> list[tuple[int, int]]:
    """Return where each matrix begins and ends in the run, in order. A group's As, which lie
    side by side, count as one matrix."""
    found = []
    for slots in _groups(layout).values():
        first = slots[0]
        found.append((first.a, first.a + first.a_stride * first.fan_in))
        found += [(slot.b, slot.b + slot.module.rank * slot.fan_out) for slot in slots]
    return sorted(found)


def _pieces(layout: Layout, most: int) -> list[int]:
    """Return where pieces of the run end. A piece consists of whole matrices and has at most
    ``most`` numbers, unless a single matrix has more."""
    ends: list[int] = []
    first = 0
    for begin, end in _matrices(layout):
        if end - first > most and begin > first:
            ends.append(begin)
            first = begin
    return [*ends, layout.length]


def _rows(
    layout: Layout, begins: list[int], places: list[int]
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return the adapter's rows of the tables, by group.

    Args:
        begins: where each piece begins in the run.
        places: where each piece begins in the arena, in elements.
    """

    def at(number: int) -> int:
        piece = bisect.bisect_right(begins, number) - 1
        return places[piece] + number - begins[piece]

    found = _groups(layout)
    rows = []
    for group, members in MEMBERS.items():
        offsets = np.zeros((layout.num_layers, fields(len(members))), dtype=np.int64)
        scalings = np.zeros((layout.num_layers, len(members)), dtype=np.float32)
        for layer in range(layout.num_layers):
            slots = found.get((group, layer))
            if slots:
                each = [(s.member, s.module.rank, at(s.b), s.module.scaling) for s in slots]
                row = place_row(len(members), at(slots[0].a), each)
                offsets[layer], scalings[layer] = row
        rows.append((offsets, scalings))
    return rows
