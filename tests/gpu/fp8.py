"""FP8: weights of many magnitudes, stacked."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, Final

import torch
from veneer_server.backends.cuda.fp8 import packing, panels, reference, rows

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close


def _weight(random: Random) -> packing.PackedFp8:
    inputs = packing.BLOCK * random.choice((1, 2, 3, 17, random.randint(1, 12)))
    weights = []
    for _ in range(random.randint(1, 3)):
        weight = numbers(random, random.randint(1, 70), inputs, dtype=torch.float32)
        weights.append(weight * 10 ** random.uniform(-4, 2))
    weight = packing.pack(weights)
    # All bytes but the NaNs, subnormal numbers among them.
    every = [byte for byte in range(256) if byte & 127 != 127]
    count = min(len(every), weight.numbers.numel())
    weight.numbers.view(-1)[:count] = torch.tensor(
        random.sample(every, count), dtype=torch.uint8
    )
    return weight


def _guarded(guard: Guard, weight: packing.PackedFp8) -> packing.PackedFp8:
    return replace(
        weight,
        numbers=guard.given("numbers", weight.numbers, filler=127),
        scales=guard.given("scales", weight.scales),
    )


def _multiplied(
    random: Random, x: torch.Tensor, weight: packing.PackedFp8, dtype: torch.dtype, bias: Any
) -> torch.Tensor:
    guard = Guard(random)
    y = guard.out(
        "y",
        numbers(random, len(x), weight.out_features, dtype=dtype),
        gap=random.choice((0, 3)),
    )
    with order(random):
        rows.multiply(
            guard.given("x", x, gap=random.choice((0, 5))),
            _guarded(guard, weight),
            None if bias is None else guard.given("bias", bias),
            guard.scratch("partials", rows.splits(weight), len(x), weight.out_features),
            y,
        )
    guard.check()
    return y.contiguous()


def _check_rows(random: Random) -> str:
    weight = _weight(random)
    count = random.choice((1, 2, 3, 15, 16, 17, random.randint(1, 35)))
    x = numbers(random, count, weight.in_features)
    dtype = random.choice((torch.float32, torch.bfloat16))
    bias = random.choice((None, numbers(random, weight.out_features)))
    told = f"{count} rows, {weight.in_features} -> {weight.out_features}"
    expected, magnitude = reference.multiply(x, weight)
    if bias is not None:
        expected = expected + bias.double()
        magnitude = magnitude + bias.double().abs()
    tolerance = magnitude * 2**-18
    if dtype == torch.bfloat16:
        tolerance = tolerance + expected.abs() * 2**-8
    spoiled = random.choice((None, random.randrange(count)))
    if spoiled is not None:
        x[spoiled] = torch.nan
    got = _multiplied(random, x, weight, dtype, bias)
    kept = [row for row in range(count) if row != spoiled]
    close(told, got[kept], expected[kept], tolerance[kept])
    chosen = random.choices(range(count), k=random.randint(1, 20))
    again = _multiplied(random, x[chosen], weight, dtype, bias)
    same = (again == got[chosen]) | (again.isnan() & got[chosen].isnan())
    assert same.all(), f"{told}: a row's bits depend on the batch"
    return told


def _check_panels(random: Random) -> str:
    weight = _weight(random)
    right = reference.expand(weight)
    told = f"{weight.in_features} -> {weight.out_features}"
    assert torch.equal(right, right.bfloat16().float()), f"{told}: no bfloat16 numbers"
    begin = random.randrange(weight.out_features)
    end = random.randint(begin + 1, weight.out_features)
    guard = Guard(random)
    panel = guard.out("panel", torch.zeros(end - begin, weight.in_features).bfloat16())
    with order(random):
        panels.expand(_guarded(guard, weight), begin, end, panel)
    guard.check()
    assert torch.equal(panel.float(), right[begin:end]), f"{told}: a number differs"
    return told


SUBJECTS: Final = (
    Subject(
        "fp8 rows",
        _check_rows,
        (
            Bug("no sign", rows, "((wide & 128) << 8) | ", ""),
            Bug("stride of blocks", rows, "place = (k * outputs + n", "place = (k * rows + n"),
            Bug(
                "a split's last block left out",
                rows,
                "tl.minimum(split * SPLIT + SPLIT, blocks)",
                "tl.minimum(split * SPLIT + SPLIT, blocks) - 1",
            ),
            Bug("not scaled back", rows, "other=0.0) * 256.0", "other=0.0) * 128.0"),
            Bug(
                "mask of outputs",
                rows,
                "known = n < outputs\n    inner",
                "known = n <= outputs\n    inner",
            ),
        ),
    ),
    Subject(
        "fp8 panels",
        _check_panels,
        (
            Bug("first output", panels, "(n - begin)[:, None]", "n[:, None]"),
            Bug("past the end", panels, "known = n < end", "known = n < end + 1"),
            Bug(
                "another's scale", panels, "tl.load(scales + n,", "tl.load(scales + n - begin,"
            ),
        ),
    ),
)
