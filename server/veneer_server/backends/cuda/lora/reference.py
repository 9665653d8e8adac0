"""Reference for `rows` and `panels`: one segment at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from veneer_server.backends.cuda.lora.tables import FIRST_MEMBER, MEMBER_FIELDS, AdapterSlots


def add(
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    segments: Iterable[tuple[int, int, int]],
    adapters: AdapterSlots,
    *,
    rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``y`` plus each segment's update, and the sum of its terms' magnitudes.

    Args:
        x: [rows, fan_in].
        y: [rows, sum of fan_outs].
        segments: tuples of first row, one past the last row, slot.
        rounded: whether x times A is rounded to bfloat16, as in `panels`.

    Returns:
        Two tensors like ``y``, in float64; rounding errors are judged against the second.
    """
    total, magnitude = y.double(), y.double().abs()
    places, scalings = adapters.places.tolist(), adapters.scalings.tolist()
    for begin, end, slot in segments:
        a, ranks = places[slot][:FIRST_MEMBER]
        if begin == end or ranks == 0:
            continue
        matrix = arena[a : a + adapters.fan_in * ranks].view(adapters.fan_in, ranks).double()
        here = x[begin:end].double()
        shrunk, most = here @ matrix, here.abs() @ matrix.abs()
        if rounded:
            shrunk = shrunk.bfloat16().double()
        column = 0
        for member, fan_out in enumerate(adapters.fan_outs):
            start = FIRST_MEMBER + MEMBER_FIELDS * member
            b, rank, before = places[slot][start : start + MEMBER_FIELDS]
            if rank:
                expand = arena[b : b + rank * fan_out].view(rank, fan_out).double()
                of_a = slice(before, before + rank)
                target = (slice(begin, end), slice(column, column + fan_out))
                scaling = scalings[slot][member]
                total[target] += scaling * (shrunk[:, of_a] @ expand)
                magnitude[target] += abs(scaling) * (most[:, of_a] @ expand.abs())
            column += fan_out
    return total, magnitude
