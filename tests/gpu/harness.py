"""The checks' own checks: bfloat16 as torch rounds it, races and stray accesses noticed."""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import OutOfBounds, Race, order, to_bfloat16
from tests.gpu.subject import Subject, close


@triton.jit
def shifted(x, y, by, size, BLOCK: tl.constexpr):  # noqa: N803 (as kernels have them)
    """y[i + by] = x[i] by programs of BLOCK elements, each of which also clears y[i]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.zeros((BLOCK,), tl.float32), mask=place < size)
    tl.store(y + place + by, tl.load(x + place, mask=place < size), mask=place + by < size)


@triton.jit
def multiplied(x, y, out, SIZE: tl.constexpr):  # noqa: N803
    """out = x @ y, all [SIZE, SIZE]."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(x + place), tl.load(y + place))
    tl.store(out + place, product.to(tl.bfloat16))


def _noticed(random: Random, by: int, size: int, read: int) -> str:
    guard = Guard(random)
    x = guard.given("x", numbers(random, size, dtype=torch.float32))
    y = guard.out("y", torch.zeros(size))
    try:
        with order(random):
            shifted[(4,)](x, y, by, read, BLOCK=16)
    except (Race, OutOfBounds) as error:
        return type(error).__name__
    return ""


def _check(random: Random) -> str:
    bits = np.array([random.getrandbits(32) for _ in range(2000)], np.uint32)
    floats = bits.view(np.float32)
    expected = torch.from_numpy(floats.copy()).bfloat16()
    got = torch.from_numpy(to_bfloat16(floats).view(np.int16).copy()).view(torch.bfloat16)
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), "a number is rounded as torch does not"
    x, y = numbers(random, 16, 16), numbers(random, 16, 16)
    guard = Guard(random)
    out = guard.out("out", torch.zeros(16, 16).bfloat16())
    multiplied[(1,)](guard.given("x", x), guard.given("y", y), out, SIZE=16)
    right = x.double() @ y.double()
    close("a matrix multiply", out, right, 2**-8 * right.abs() + 1e-5)
    size = random.randint(49, 63)
    assert _noticed(random, 0, size, size) == "", "a right launch was refused"
    by = random.randint(1, 20)
    assert _noticed(random, by, size, size) == "Race", "a race was not noticed"
    assert _noticed(random, 0, size, size + 1) == "OutOfBounds", (
        "a stray access was not noticed"
    )
    return f"{size} elements, {by} apart"


SUBJECTS: Final = (Subject("harness", _check, ()),)
