"""Buffers whose surroundings are known: NaN around numbers, a chosen value around tables."""

from __future__ import annotations

import math
from random import Random

import torch

from tests.gpu.interpreter import allow

PAD = 501
"""Elements before and after a buffer."""


class Guard:
    """Buffers of one launch, and the only memory that programs may access from now on.

    ``given`` buffers must not change, ``out`` ones only inside; neither may the space between
    their rows. All lie at odd places: kernels may only rely on what launches promise.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._ranges: list[tuple[int, int]] = []
        self._kept: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def given(
        self, name: str, values: torch.Tensor, *, filler: float = math.nan, gap: int = 0
    ) -> torch.Tensor:
        """A copy of ``values`` in a guarded place.

        Args:
            filler: what surrounds it. NaN is 0 for integers.
            gap: elements between rows (of the last dimension).
        """
        return self._place(name, values, filler, gap, written=False)

    def out(self, name: str, values: torch.Tensor, *, gap: int = 0) -> torch.Tensor:
        """The same, to be written to."""
        return self._place(name, values, math.nan, gap, written=True)

    def scratch(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Memory to be written to, that has NaN in it (a large number if of integers)."""
        filler = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max // 3
        return self.out(name, torch.full(shape, filler, dtype=dtype))

    def check(self) -> None:
        """Raises AssertionError: something was written that must not be."""
        for name, whole, before, mine in self._kept:
            same = _bytes(whole) == _bytes(before)
            changed = (~same).any(dim=1) & ~mine
            if changed.any():
                first = int(changed.nonzero()[0])
                raise AssertionError(
                    f"{name}: wrote at {first - PAD} of {len(whole) - 2 * PAD}"
                )

    def _place(
        self, name: str, values: torch.Tensor, filler: float, gap: int, *, written: bool
    ) -> torch.Tensor:
        width = values.shape[-1] if values.dim() else 1
        rows = values.numel() // width if width else 0
        length = rows * (width + gap)
        integer = not values.dtype.is_floating_point
        fill = 0 if integer and math.isnan(filler) else filler
        whole = torch.full((length + 2 * PAD,), fill, dtype=values.dtype)
        strides, step = [1], width + gap
        for size in reversed(values.shape[1:]):
            if len(strides) > 1:
                step *= size
            strides.append(step)
        shape = values.shape if values.dim() else (1,)
        strides = strides[: len(shape)] if len(shape) > 1 else [1]
        view = whole.as_strided(shape, tuple(reversed(strides)), PAD)
        view.copy_(values)
        if values.numel():
            last = sum(
                (size - 1) * stride
                for size, stride in zip(view.shape, view.stride(), strict=True)
            )
            start = view.data_ptr()
            self._ranges.append((start, start + (last + 1) * view.element_size()))
            allow(self._ranges)
        mine = torch.zeros(len(whole), dtype=torch.bool)
        if written:
            inside = mine.as_strided(shape, tuple(reversed(strides)), PAD)
            inside.fill_(True)
        self._kept.append((name, whole, whole.clone(), mine))
        return view


def _bytes(whole: torch.Tensor) -> torch.Tensor:
    return whole.view(torch.uint8).view(len(whole), -1)


def numbers(random: Random, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normally distributed numbers."""
    generator = torch.Generator().manual_seed(random.getrandbits(48))
    return torch.randn(shape, generator=generator).to(dtype)
