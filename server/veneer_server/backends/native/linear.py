"""The base's linears, packed for the kernels (``cpp/kernels/gemm/linear.h``)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.library import (
    BFLOAT16,
    BLOCK,
    EIGHT_BIT,
    FOUR_BIT,
    Library,
    Linear,
    address,
)
from veneer_server.models.checkpoint.code_books import NF4
from veneer_server.models.linear import Expanded, stack_biases, stack_four_bit
from veneer_server.models.packed import row_slices, rows_of

_TILE = 32
_TOGETHER = 64
"""If two parts are interleaved, they take turns by this many consecutive outputs."""
_TIMED = (2048, 1024)
_SHARES = {1: 0.5, 8: 0.6, 32: 0.7}
"""Of the time of a step with adapters, how much the base's multiplies take, by the number of
sequences. What `int8_gain` makes of them was compared with measured steps: see docs/cpus.md."""
_WORTH_TELLING = 1.2


class NativeLinear:
    """A `models.linear.ServedLinear` whose weights are in the kernels' order.

    Attributes:
        struct: the linear as the kernels take it; valid as long as this object lives.
        packed: the weights.
    """

    def __init__(
        self,
        library: Library,
        kind: int,
        packed: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        table: torch.Tensor | None,
        parts: int = 1,
    ) -> None:
        self._library = library
        self.packed = packed
        self._bias = bias
        self._table = table
        self.shape = shape
        self.struct = Linear(
            weights=address(packed),
            bias=address(bias),
            outputs=shape[0],
            inputs=shape[1],
            kind=kind,
            parts=parts,
        )
        self.struct.unit = 1.0
        if table is not None:
            bits = table_bits(table.bfloat16())
            self.struct.table[:] = bits
            self.struct.bytes[:], self.struct.unit = table_bytes(bits)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._library.multiply(self.struct, x.contiguous())

    def expanded(self) -> Iterator[Expanded]:
        """See `ServedLinear.expanded`. Numbers are exactly those that the kernels use."""
        outputs, inputs = self.shape
        tiles = self.packed.view(-(-outputs // _TILE), inputs // BLOCK, -1)
        if self.struct.parts == 2:
            tiles = tiles.view(-1, 2, _TOGETHER // _TILE, *tiles.shape[1:])
            tiles = tiles.transpose(0, 1).flatten(0, 2)
        for rows in row_slices(outputs, inputs):
            part = tiles[rows.start // _TILE : -(-rows.stop // _TILE)]
            numbers = self._numbers(part)
            yield numbers[: rows.stop - rows.start], rows_of(self._bias, rows)

    def _numbers(self, tiles: torch.Tensor) -> torch.Tensor:
        """Dequantize some tiles: [outputs, inputs] float32."""
        count, blocks, _ = tiles.shape
        if self.struct.kind == BFLOAT16:
            pairs = tiles.view(torch.bfloat16).view(count, blocks * BLOCK // 2, _TILE, 2)
            return pairs.transpose(1, 2).reshape(count * _TILE, -1).float()
        scales = tiles[..., -4 * _TILE :].contiguous().view(torch.float32)
        codes = tiles[..., : -4 * _TILE].contiguous()
        if self.struct.kind == EIGHT_BIT:
            pairs = codes.view(torch.int8).view(count, blocks, BLOCK // 2, _TILE, 2)
            plain = pairs.permute(0, 3, 1, 2, 4).reshape(count, _TILE, blocks, BLOCK).float()
        else:
            assert self._table is not None
            # dimensions: tile, block, half, group, output within the half, position in its pair
            words = codes.view(torch.int16).view(count, blocks, 2, 8, 16, 2).int()
            fours = torch.stack([(words >> 4 * q) & 15 for q in range(4)], dim=4)
            # [tile, half, output, block, group, q, position in its pair]
            ordered = fours.permute(0, 2, 5, 1, 3, 4, 6).reshape(count, _TILE, blocks, BLOCK)
            plain = self._table.float()[ordered]
        scaled = plain * scales.transpose(1, 2).unsqueeze(-1)
        return scaled.view(count * _TILE, blocks * BLOCK)


def table_bits(table: torch.Tensor) -> tuple[int, ...]:
    """Return the bits of a bfloat16 code book's numbers."""
    return tuple(code & 0xFFFF for code in table.view(torch.int16).tolist())


@functools.cache
def table_bytes(bits: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """Approximate a code book's numbers by integer multiples of a unit. Returns the integers,
    of 8 bits, and the unit. Units are tried for which the largest number is 64 to 127; the one
    with the least mean square error is taken.

    Args:
        bits: bits of the numbers in bfloat16. For NF4 its exact numbers are used instead.
    """
    numbers = (
        torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    )
    exact = torch.tensor(NF4, dtype=torch.float64)
    if table_bits(exact.bfloat16()) == bits:
        numbers = exact
    units = numbers.abs().max() / torch.arange(64, 127.005, 0.01, dtype=torch.float64)
    rounded = torch.round(numbers / units.unsqueeze(1))
    errors = (rounded * units.unsqueeze(1) - numbers).square().sum(1)
    best = int(errors.argmin())
    return tuple(rounded[best].int().tolist()), float(units[best])


def int8_gain(library: Library) -> str:
    """Say what inputs of 8 bits would gain on this machine, or nothing if that is little.

    Times a multiply of 4-bit weights, in about 30 ms, and estimates whole steps.
    """
    random = torch.Generator().manual_seed(0)
    outputs, inputs = _TIMED
    codes = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, generator=random)
    scales = torch.rand(outputs, inputs // BLOCK, generator=random)
    packed = library.pack_four_bit(codes, scales)
    table = torch.tensor(NF4).bfloat16()
    linear = NativeLinear(library, FOUR_BIT, packed, _TIMED, None, table)
    gains = []
    for rows, share in _SHARES.items():
        x = torch.randn(rows, inputs, generator=random).bfloat16()
        least = [math.inf, math.inf]
        for number in range(8):  # in turns, so that other load on the machine affects both
            linear.struct.int8_inputs = number % 2
            began = time.perf_counter()
            linear(x)
            took = time.perf_counter() - began
            least[number % 2] = min(took, least[number % 2])
        gains.append(1 / (1 - share + share * least[1] / least[0]))
    if max(gains) < _WORTH_TELLING:
        return ""
    told = [f"{gain:.1f}" for gain in gains]
    return (
        f"--int8-activations would decode 1, 8 and 32 sequences about {', '.join(told[:-1])} "
        f"and {told[-1]} times as fast, with 0.4 % more perplexity (docs/cpus.md)"
    )


def fuse(library: Library, modules: Sequence[nn.Module], dtype: torch.dtype) -> NativeLinear:
    """Fuse modules that share an input into one linear, as `models.linear.fuse` does.

    Raises:
        NativeUnavailable: the kernels do not support these linears.
    """
    import bitsandbytes as bnb

    assert dtype == torch.bfloat16
    four_bit = [isinstance(m, bnb.nn.Linear4bit) for m in modules]
    if all(four_bit):
        return _four_bit(library, modules)
    if any(four_bit):
        raise NativeUnavailable("some linears of a group have 4 bits and others do not")
    weights: list[Any] = [m.weight for m in modules]
    weight = torch.cat([w.data for w in weights]).to(dtype).contiguous()
    bias = stack_biases(modules, torch.float32)
    return pack_dense(library, BFLOAT16, weight, bias, parts_of(len(modules), len(weight)))


def parts_of(modules: int, outputs: int) -> int:
    """Return how many parts of a fused linear are interleaved: 2 for gate and up, if their size
    allows it, else 1. A thread then computes the same columns of gate and up, and still reads
    memory in order."""
    return 2 if modules == 2 and outputs % (2 * _TOGETHER) == 0 else 1


def by_turns(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """Put ``rows``, [outputs, ...], into the order of packing: two parts are interleaved."""
    if parts == 1:
        return rows.contiguous()
    turns = rows.view(2, -1, _TOGETHER, *rows.shape[1:]).transpose(0, 1)
    return turns.reshape(rows.shape)


def pack_dense(
    library: Library,
    kind: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    parts: int = 1,
) -> NativeLinear:
    """Pack a bfloat16 weight [outputs, inputs], unchanged or in 8 bits.

    Raises:
        NativeUnavailable: the number of inputs is no multiple of 64.
    """
    outputs, inputs = weight.shape
    if inputs % BLOCK:
        raise NativeUnavailable(f"a linear has {inputs} inputs, not a multiple of {BLOCK}")
    packed = library.pack_dense(kind, by_turns(weight, parts))
    return NativeLinear(library, kind, packed, (outputs, inputs), bias, None, parts)


def _four_bit(library: Library, modules: Sequence[Any]) -> NativeLinear:
    fused = stack_four_bit(modules)
    if fused is None:
        raise NativeUnavailable("the 4-bit linears of a group differ in kind")
    state = fused.weight.quant_state
    outputs, inputs = state.shape
    if state.blocksize != BLOCK or inputs % BLOCK:
        raise NativeUnavailable(
            f"a 4-bit linear has {inputs} inputs in blocks of {state.blocksize}; the kernels "
            f"need blocks of {BLOCK} that fill its rows"
        )
    scales = state.absmax
    assert not state.nested, "stacking expands nested scales"
    parts = parts_of(len(modules), outputs)
    packed = library.pack_four_bit(
        by_turns(fused.weight.data.contiguous().view(outputs, inputs // 2), parts),
        by_turns(scales.contiguous().view(outputs, inputs // BLOCK), parts),
    )
    return NativeLinear(
        library,
        FOUR_BIT,
        packed,
        (outputs, inputs),
        fused.bias.float().contiguous() if fused.bias is not None else None,
        state.code.to(torch.bfloat16),
        parts,
    )
