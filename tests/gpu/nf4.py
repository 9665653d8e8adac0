"""NF4: weights as bitsandbytes quantizes them, stacked, with and without nested scales."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random
from typing import Any, Final

import bitsandbytes.functional as bnb
import torch
from veneer_server.backends.cuda.nf4 import packing, panels, reference, rows

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close


def _weights(random: Random) -> list[tuple[torch.Tensor, Any]]:
    inputs = packing.BLOCK * random.choice((1, 2, 3, 17, random.randint(1, 12)))
    nested = random.random() < 0.6
    return [
        bnb.quantize_4bit(
            numbers(random, random.randint(1, 70), inputs, dtype=torch.float32)
            * random.uniform(0.01, 3),
            compress_statistics=nested,
            quant_type="nf4",
        )
        for _ in range(random.randint(1, 3))
    ]


def _guarded(guard: Guard, weight: packing.PackedNf4) -> packing.PackedNf4:
    names = [field.name for field in fields(weight)]
    return replace(weight, **{name: guard.given(name, getattr(weight, name)) for name in names})


def _told(weight: packing.PackedNf4) -> str:
    kind = "nested" if weight.nested else "plain"
    return f"{weight.in_features} -> {weight.out_features}, {kind} scales"


def _multiplied(
    random: Random, x: torch.Tensor, weight: packing.PackedNf4, dtype: torch.dtype, bias: Any
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
    weight = packing.pack(_weights(random))
    count = random.choice((1, 2, 3, 15, 16, 17, random.randint(1, 35)))
    x = numbers(random, count, weight.in_features)
    dtype = random.choice((torch.float32, torch.bfloat16))
    bias = random.choice((None, numbers(random, weight.out_features)))
    told = f"{count} rows, {_told(weight)}"
    expected, magnitude = reference.multiply(x, weight)
    if bias is not None:
        expected = expected + bias.double()
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
    weights = _weights(random)
    weight = packing.pack(weights)
    right = torch.cat([bnb.dequantize_4bit(data, state) for data, state in weights])
    told = _told(weight)
    assert torch.equal(reference.expand(weight), right), f"{told}: packing changed a number"
    begin = random.randrange(weight.out_features)
    end = random.randint(begin + 1, weight.out_features)
    guard = Guard(random)
    panel = guard.out("panel", torch.zeros(end - begin, weight.in_features).bfloat16())
    with order(random):
        panels.expand(_guarded(guard, weight), begin, end, panel)
    guard.check()
    assert torch.equal(panel, right[begin:end].bfloat16()), f"{told}: a number differs"
    return told


SUBJECTS: Final = (
    Subject(
        "nf4 rows",
        _check_rows,
        (
            Bug(
                "halves swapped",
                rows,
                "left = tl.load(of_x + k * 64,",
                "left = tl.load(of_x + k * 64 + 32,",
            ),
            Bug(
                "stride of blocks",
                rows,
                "place = (k * outputs + n.to(tl.int64)) * 32",
                "place = (k * (outputs - 1) + n.to(tl.int64)) * 32",
            ),
            Bug(
                "no mask of rows",
                rows,
                "right = tl.load(of_x + k * 64 + 32, mask=row[:, None] < rows, other=0.0)",
                "right = tl.load(of_x + k * 64 + 32 - (row[:, None] >= rows - 1) * 1)",
            ),
            Bug("group off by one", rows, "other=0) + k) >> 8", "other=0) + k + 1) >> 8"),
            Bug(
                "last block left out",
                rows,
                "tl.minimum(split * SPLIT + SPLIT, blocks)",
                "tl.minimum(split * SPLIT + SPLIT, blocks - 1)",
            ),
            Bug(
                "no mask of outputs",
                rows,
                "mask=(row[:, None] < rows) & known[None, :]",
                "mask=row[:, None] < rows",
            ),
        ),
    ),
    Subject(
        "nf4 panels",
        _check_panels,
        (
            Bug(
                "halves swapped",
                panels,
                "low = tl.load(codes + (pairs & 15))",
                "low = tl.load(codes + (pairs >> 4))",
            ),
            Bug(
                "stride of the panel",
                panels,
                "(n - begin)[:, None].to(tl.int64) * inputs",
                "(n - begin)[:, None].to(tl.int64) * (inputs - 64)",
            ),
            Bug("no mask of outputs", panels, "known = n < end", "known = n < outputs"),
            Bug(
                "offset of another output",
                panels,
                "k, n, known, outputs, NESTED)",
                "k, n - begin, known, outputs, NESTED)",
            ),
        ),
    ),
)
