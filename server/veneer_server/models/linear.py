"""Linear layers of the frozen base, unquantized or 4-bit, fused where that is exact.

bitsandbytes' NF4 and FP4 blocks run along rows, so one GEMM with the stacked rows of q, k
and v (or gate and up) gives exactly the numbers of separate GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import torch
from torch import nn

from veneer_server.models.packed import (
    PackedFourBit,
    expanding_pays,
    row_slices,
    rows_of,
    torch_threads,
)
from veneer_server.models.quantized import QuantizedMatrix

_MANY_ROWS: Final = 16
"""Rows from which `QuantizedLinear` multiplies with all threads."""

Expanded = tuple[torch.Tensor, torch.Tensor | None]
"""Rows of a weight, [rows, in_features], and their biases, [rows]; both float32."""


class ServedLinear(Protocol):
    """A linear: x [rows, in_features], from `rounded` -> [rows, out_features] in the
    serving dtype or float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights and biases."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the dtype in which this many rows are multiplied. Separate from the GEMM,
        because the conversion is too short for the GEMM's threads."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def expanded(self) -> Iterator[Expanded]:
        """Yield the weight as plain numbers, a few million at a time: its rows in order, with
        their biases. For callers that compute without this linear's GEMM."""


class Dense:
    """An unquantized linear; weight [out_features, in_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.weight.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def expanded(self) -> Iterator[Expanded]:
        for rows in row_slices(*self.weight.shape):
            yield self.weight[rows].float(), rows_of(self.bias, rows)


class FourBit:
    """A bitsandbytes 4-bit linear, called through its module."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._dtype = module.compute_dtype

    @property
    def nbytes(self) -> int:
        state = self._module.weight.quant_state
        return int(self._module.weight.nbytes + state.absmax.nbytes)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._module(x)
        return y

    def expanded(self) -> Iterator[Expanded]:
        weight, state = self._module.weight.data, self._module.weight.quant_state
        count, columns = state.shape
        slices = row_slices(count, columns)
        if columns % state.blocksize:
            slices = iter([slice(0, count)])  # rows do not begin at block boundaries
        for rows in slices:
            cut = slice(rows.start * columns, rows.stop * columns)
            numbers: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
                weight.view(-1)[cut.start // 2 : -(-cut.stop // 2)],
                state.absmax[cut.start // state.blocksize : -(-cut.stop // state.blocksize)],
                state.blocksize,
                state.quant_type,
                [rows.stop - rows.start, columns],
                # The GEMM rounds the weights to this dtype, too.
                state.dtype,
            )
            yield numbers.float(), rows_of(self._module.bias, rows)


class QuantizedLinear:
    """A linear whose weight stays in codes, see `models.quantized`. Each call expands a slice
    of rows at a time, and multiplies in float32, so that no number is rounded again.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features] float32.
    """

    def __init__(self, weight: QuantizedMatrix, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.order is not None:
            x = x.index_select(1, self.weight.order)
        y = x.new_empty(len(x), self.weight.rows)
        # One thread to expand, and to multiply a few rows: the operators are so short that most
        # of the time would go into waking the thread pool.
        threads = torch.get_num_threads() if len(x) >= _MANY_ROWS else 1
        for rows in self.weight.slices():
            with torch_threads(1):
                expanded = self.weight[rows].stored()
            with torch_threads(threads):
                torch.mm(x, expanded.t(), out=y[:, rows])
        return y if self.bias is None else y.add_(self.bias)

    def expanded(self) -> Iterator[Expanded]:
        for rows in row_slices(*self.weight.shape):
            yield self.weight[rows].dequantize(), rows_of(self.bias, rows)


class SideBySide:
    """Several linears over one input, outputs concatenated: the fallback of `fuse`.

    Attributes:
        parts: the linears, in the order of their outputs.
    """

    def __init__(self, parts: Sequence[ServedLinear]) -> None:
        self.parts = parts

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(part.rounded(x)) for part in self.parts], dim=-1)

    def expanded(self) -> Iterator[Expanded]:
        for part in self.parts:
            yield from part.expanded()


def fuse(modules: Sequence[nn.Module], dtype: torch.dtype) -> ServedLinear:
    """Make one `ServedLinear` from modules that share an input, with outputs in their order.

    Args:
        modules: ``nn.Linear`` or bitsandbytes ``Linear4bit``.
        dtype: dtype of the activations. The packed CPU GEMM is only used for bfloat16, since
            it rounds any activations to bfloat16.
    """
    import bitsandbytes as bnb

    if all(isinstance(m, bnb.nn.Linear4bit) for m in modules):
        fused = stack_four_bit(modules)
        if fused is not None:
            return _four_bit(fused, dtype)
    elif len(modules) == 1 or not any(isinstance(m, bnb.nn.Linear4bit) for m in modules):
        return _fuse_dense(modules, dtype)
    return SideBySide([fuse([module], dtype) for module in modules])


def _fuse_dense(modules: Sequence[Any], dtype: torch.dtype) -> Dense:
    weight = torch.cat([m.weight.data for m in modules]).to(dtype).contiguous()
    return Dense(weight, stack_biases(modules, dtype))


def stack_biases(modules: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    """Concatenate the modules' biases, with zeros for modules without one; None if no module
    has one."""
    if all(m.bias is None for m in modules):
        return None
    parts = [
        m.bias.data if m.bias is not None else m.weight.new_zeros(m.out_features)
        for m in modules
    ]
    return torch.cat(parts).to(dtype)


def stack_four_bit(modules: Sequence[Any]) -> Any | None:
    """Make one Linear4bit from the modules' stacked rows, with its nested absmax expanded; None
    if the modules differ in kind, or blocks would straddle rows.

    Raises:
        ValueError: a weight's size does not match its state.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    for module in modules:
        _check_sizes(module.weight)
    states = [m.weight.quant_state for m in modules]
    first = states[0]
    kinds = {(s.quant_type, s.blocksize, s.shape[1]) for s in states}
    if len(kinds) > 1 or (len(modules) > 1 and first.shape[1] % first.blocksize):
        return None
    scales = []
    for state in states:
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        scales.append(absmax.float())
    rows = sum(s.shape[0] for s in states)
    state = QuantState(
        absmax=torch.cat(scales),
        shape=torch.Size((rows, first.shape[1])),
        dtype=first.dtype,
        blocksize=first.blocksize,
        code=first.code,
        quant_type=first.quant_type,
    )
    data = torch.cat([m.weight.data.reshape(-1, 1).view(torch.uint8) for m in modules])
    fused = bnb.nn.Linear4bit(
        first.shape[1], rows, bias=False, compute_dtype=modules[0].compute_dtype, device="meta"
    )
    fused.weight = bnb.nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        bnb_quantized=True,
    )
    bias = stack_biases(modules, modules[0].compute_dtype or torch.float32)
    fused.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return fused.eval()


def _check_sizes(weight: Any) -> None:
    """Raise ValueError if a stored weight is not as large as its state says: native code would
    read past a shorter weight."""
    state = weight.quant_state
    numbers = state.shape.numel()
    blocks = -(-numbers // state.blocksize)
    sound = weight.nbytes == -(-numbers // 2) and state.absmax.numel() == blocks
    if state.nested:
        nested = state.state2
        sound = sound and nested.absmax.numel() == -(-blocks // nested.blocksize)
    if not sound:
        raise ValueError("the size of a 4-bit weight does not match its state")


def _four_bit(module: Any, dtype: torch.dtype) -> ServedLinear:
    state = module.weight.quant_state
    rows, columns = state.shape
    fits = rows % 32 == 0 and columns % 64 == 0 and columns % state.blocksize == 0
    on_cpu = module.weight.device.type == "cpu"
    if not (on_cpu and fits and dtype == torch.bfloat16):
        module.support_avx512bf16_for_cpu = False
    module.compute_dtype, module.compute_type_is_set = dtype, True
    if on_cpu and module.support_avx512bf16_for_cpu:
        # The first evaluation packs the weight in place (bitsandbytes 0.50).
        module(torch.zeros(1, columns, dtype=dtype))
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            return PackedFourBit(module, expands=expanding_pays())
    return FourBit(module)
