"""Lay out adapters as loaders do for the native backend: A in bfloat16, in pairs."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import StepArrays
from veneer_server.step.layout import MEMBERS, Layout, Slot

_MADE: WeakKeyDictionary[AdapterTable, AdapterTable] = WeakKeyDictionary()


def place_a(run: torch.Tensor, slot: Slot, a_t: torch.Tensor, *, paired: bool) -> None:
    """Write A transposed, [fan_in, rank], to its place in a run."""
    rank = a_t.shape[1]
    if paired:
        pairs = run.as_strided((slot.fan_in // 2, 2, rank), (2 * slot.a_stride, 1, 2), slot.a)
        pairs.copy_(a_t.reshape(pairs.shape))
    else:
        run.as_strided(a_t.shape, (slot.a_stride, 1), slot.a).copy_(a_t)


def paired(table: AdapterTable) -> AdapterTable:
    """Return the same adapter laid out for `NativeDecoder`; float32 adapters are not paired."""
    layout = table.layout
    if table.run.dtype != torch.bfloat16 or layout.paired:
        return table
    if (made := _MADE.get(table)) is None:
        shapes = {slot.module.projection: (slot.fan_out, slot.fan_in) for slot in layout.slots}
        for members in MEMBERS.values():  # projections that it does not adapt have no matrices
            inputs = [shapes[name][1] for name in members if name in shapes]
            for name in members:
                shapes.setdefault(name, (0, inputs[0] if inputs else 0))
        modules = [slot.module for slot in layout.slots]
        other = Layout.of(modules, shapes, layout.num_layers, paired=True)
        run = table.run.clone()
        for old, new in zip(layout.slots, other.slots, strict=True):
            rank = old.module.rank
            a_t = table.run.as_strided((old.fan_in, rank), (old.a_stride, 1), old.a)
            place_a(run, new, a_t, paired=True)
        made = _MADE[table] = AdapterTable(other, run)
    return made


def with_pairs(step: StepArrays) -> StepArrays:
    """Return the same step with adapters laid out for `NativeDecoder`."""
    segments = tuple(replace(each, table=paired(each.table)) for each in step.segments)
    return replace(step, segments=segments)
