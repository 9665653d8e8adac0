"""One form for every quantized matrix: ``w = scale * code[q] + min``, in blocks along each row.

NF4, FP4, MXFP4, the 4- and 8-bit integers of GPTQ, AWQ and compressed-tensors, and GGUF's block
types differ in how a file lays out codes and factors. `models.checkpoint.ggml` and
`models.checkpoint.int_codes` bring them into this form without changing a number: `dequantize`
gives, bit for bit in float32, what each format's own code gives.

The layout, for code that packs it for a backend:

* ``codes`` [rows, columns / 2] uint8 has the low four bits of two neighbouring columns in each
  byte, the even column in the low half. With 8 bits it is [rows, columns].
* ``high`` has what 5 and 6 bits have beyond four. 5 bits: [rows, columns / 8], column 8 i + j
  in bit j. 6 bits: [rows, columns / 4], column 4 i + j in bits 2 j and 2 j + 1.
* ``table`` [2 ** bits] float32 holds the number for each code.
* A block has one scale and at most one min. Either is a product of two factors: ``outer`` for
  one or more neighbouring blocks, ``inner`` (small integers, exact in float32) for each block.
  The product is rounded once, to float32.
* ``order``, if there is one, says which input feature a stored column is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

SLICE: Final = 1 << 18
"""Numbers expanded at a time: 1 MB of float32, which a core's second cache holds."""
_HIGH: Final = {4: 0, 5: 1, 6: 2, 8: 0}
"""Bits of a code -> bits of it that are in ``high``."""

_Rows = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockFactors:
    """The scales, or the mins, of a matrix's blocks.

    Attributes:
        outer: [rows, blocks / n] float16, bfloat16 or float32, each for n neighbouring blocks.
        inner: [rows, blocks] int8, uint8 or int16, by which `outer` is multiplied; None: by 1.
    """

    outer: torch.Tensor
    inner: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks in a row."""
        return (self.outer if self.inner is None else self.inner).shape[1]

    @property
    def nbytes(self) -> int:
        return self.outer.nbytes + (0 if self.inner is None else self.inner.nbytes)

    def values(self) -> torch.Tensor:
        """Return the factors as [rows, blocks] float32."""
        outer = self.outer.float()
        if self.inner is None:
            return outer
        rows, blocks = self.inner.shape
        inner = self.inner.float().view(rows, outer.shape[1], -1)
        return (outer.unsqueeze(2) * inner).view(rows, blocks)

    def of(self, rows: _Rows) -> BlockFactors:
        """Apply a function that chooses rows to each tensor."""
        return BlockFactors(rows(self.outer), None if self.inner is None else rows(self.inner))


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight [rows, columns], which is [outputs, inputs] of a linear; see the module.

    Attributes:
        columns: a multiple of 8.
        bits: 4, 5, 6 or 8.
        mins: None: 0.
        order: [columns] int64, the input feature of each stored column; None: their order.

    Raises:
        ValueError: the parts do not fit together.
    """

    columns: int
    bits: int
    codes: torch.Tensor
    high: torch.Tensor | None
    table: torch.Tensor
    scales: BlockFactors
    mins: BlockFactors | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns, extra = self.rows, self.columns, _HIGH.get(self.bits)
        if extra is None:
            raise ValueError(f"codes have {self.bits} bits: 4, 5, 6 and 8 are known")
        expected = [
            (self.codes, (rows, columns if self.bits == 8 else columns // 2)),
            (self.table, (1 << self.bits,)),
        ]
        if extra and self.high is not None:
            expected.append((self.high, (rows, columns * extra // 8)))
        sound = columns % 8 == 0 and columns > 0 and bool(extra) == (self.high is not None)
        sound = sound and all(tuple(part.shape) == shape for part, shape in expected)
        for factors in (self.scales, self.mins):
            if sound and factors is not None:
                blocks, outers = self.scales.blocks, factors.outer.shape[1]
                sound = factors.outer.shape[0] == rows and factors.blocks == blocks > 0
                sound = sound and outers > 0 and columns % blocks == 0 == blocks % outers
                sound = sound and (factors.inner is None or factors.inner.shape[0] == rows)
        if self.order is not None:
            sound = sound and tuple(self.order.shape) == (columns,)
        if not sound:
            raise ValueError("the parts of a quantized matrix do not fit together")

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def block(self) -> int:
        """Columns that share a scale: 16 to 256, or all columns of a row."""
        return self.columns // self.scales.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of codes, factors, table and order."""
        own = self.codes.nbytes + self.table.nbytes + self.scales.nbytes
        for part in (self.high, self.order):
            own += 0 if part is None else part.nbytes
        if self.mins is not None:
            own += self.mins.nbytes
            if self.mins.outer is self.scales.outer:  # GPTQ and AWQ: a multiple of the scale
                own -= self.mins.outer.nbytes
        return own

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantizedMatrix:
        """Return the matrix of some rows: a slice (a view), or indices [n] int64."""

        def chosen(part: torch.Tensor) -> torch.Tensor:
            return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)

        return replace(
            self,
            codes=chosen(self.codes),
            high=None if self.high is None else chosen(self.high),
            scales=self.scales.of(chosen),
            mins=None if self.mins is None else self.mins.of(chosen),
        )

    def slices(self) -> Iterator[slice]:
        """Yield slices of all rows in order, each of about `SLICE` numbers."""
        step = max(SLICE // self.columns, 1)
        for begin in range(0, self.rows, step):
            yield slice(begin, min(begin + step, self.rows))

    def to(self, device: torch.device) -> QuantizedMatrix:
        """Return the matrix on a device."""

        def moved(part: torch.Tensor) -> torch.Tensor:
            return part.to(device)

        if self.codes.device == device:
            return self
        return replace(
            self,
            codes=moved(self.codes),
            high=None if self.high is None else moved(self.high),
            table=moved(self.table),
            scales=self.scales.of(moved),
            mins=None if self.mins is None else self.mins.of(moved),
            order=None if self.order is None else moved(self.order),
        )

    def numbers(self) -> torch.Tensor:
        """Return the codes, [rows, columns] uint8, in the order of the stored columns."""
        if self.bits == 8:
            return self.codes
        found = _look_up(_spread(4, 0, torch.int16), self.codes).view(torch.uint8)
        if self.high is not None:
            each = _HIGH[self.bits]
            wide = {1: torch.int64, 2: torch.int32}[each]
            found |= _look_up(_spread(each, 4, wide), self.high).view(torch.uint8)
        return found.view(self.rows, self.columns)

    def stored(self) -> torch.Tensor:
        """Return the weights, [rows, columns] float32, in the order of the stored columns."""
        if self.bits == 4:
            # Two at a time: a byte looks up a pair of float32, moved as one number of 64 bits.
            pairs = self.table[_spread(4, 0, torch.int16).view(torch.uint8).long()]
            found = _look_up(pairs.view(torch.int64), self.codes).view(torch.float32)
        else:
            found = _look_up(self.table, self.numbers())
        blocks = found.view(self.rows, self.scales.blocks, -1)
        blocks.mul_(self.scales.values().unsqueeze(2))
        if self.mins is not None:
            blocks.add_(self.mins.values().unsqueeze(2))
        return found.view(self.rows, self.columns)

    def dequantize(self) -> torch.Tensor:
        """Return the weights, [rows, columns] float32, in the order of the input features."""
        stored = self.stored()
        if self.order is None:
            return stored
        return torch.empty_like(stored).index_copy_(1, self.order, stored)


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return table.to(codes.device).index_select(0, codes.reshape(-1).int())


@functools.cache
def _spread(each: int, shift: int, dtype: torch.dtype) -> torch.Tensor:
    """[256]: for each byte its groups of ``each`` bits, the lowest first, as uint8 shifted left
    by ``shift``, all in one number of ``dtype``."""
    byte = torch.arange(256)
    parts = [((byte >> at) & ((1 << each) - 1)) << shift for at in range(0, 8, each)]
    return torch.stack(parts, dim=1).to(torch.uint8).view(dtype).view(-1)


def packed_codes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Lay out codes [rows, columns] uint8, each below 2 ** bits: return ``codes`` and ``high``
    of a `QuantizedMatrix`."""
    if bits == 8:
        return codes.contiguous(), None
    rows = codes.shape[0]
    pairs = (codes & 0xF).view(rows, -1, 2)
    low = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    each = _HIGH[bits]
    if not each:
        return low, None
    parts = (codes >> 4).view(rows, -1, 8 // each)
    high = parts[:, :, 0].clone()
    for at in range(1, 8 // each):
        high |= parts[:, :, at] << (at * each)
    return low, high


def stacked(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Make one matrix of the rows of several, in their order; None if they differ in kind."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if not all(_alike(first, each) for each in matrices[1:]):
        return None

    def joined(part: Callable[[QuantizedMatrix], torch.Tensor | None]) -> torch.Tensor | None:
        found = [part(each) for each in matrices]
        return torch.cat([each for each in found if each is not None]) if found else None

    def factors(part: Callable[[QuantizedMatrix], BlockFactors | None]) -> BlockFactors | None:
        found = [each for each in map(part, matrices) if each is not None]
        if not found:
            return None
        inner = [each.inner for each in found if each.inner is not None]
        return BlockFactors(
            torch.cat([each.outer for each in found]), torch.cat(inner) if inner else None
        )

    codes, scales = joined(lambda each: each.codes), factors(lambda each: each.scales)
    mins = factors(lambda each: each.mins)
    assert codes is not None
    assert scales is not None
    if mins is not None and first.mins is not None and first.mins.outer is first.scales.outer:
        mins = replace(mins, outer=scales.outer)
    return replace(
        first,
        codes=codes,
        high=None if first.high is None else joined(lambda each: each.high),
        scales=scales,
        mins=mins,
    )


def _alike(one: QuantizedMatrix, other: QuantizedMatrix) -> bool:
    def kind(each: QuantizedMatrix) -> list[object]:
        found: list[object] = [each.columns, each.bits]
        for factors in (each.scales, each.mins):
            if factors is None:
                found.append(None)
                continue
            found += [factors.outer.dtype, factors.outer.shape[1], factors.blocks]
            found.append(None if factors.inner is None else factors.inner.dtype)
        shared = each.mins is not None and each.mins.outer is each.scales.outer
        return [*found, shared]

    if one.order is None or other.order is None:
        if one.order is not other.order:
            return False
    elif not torch.equal(one.order, other.order):
        return False
    return kind(one) == kind(other) and torch.equal(one.table, other.table)
