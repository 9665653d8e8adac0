"""Linear layers of the frozen base, unquantized or 4-bit, fused where exact.

bitsandbytes' NF4 and FP4 blocks run along rows, so stacking the rows of q, k
and v (or gate and up) gives the very same numbers as three products, in one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Linear", "fuse"]


class Linear(Protocol):
    """x [rows, in_features] -> [rows, out_features], in x's dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights and biases."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Dense:
    """An unquantized linear; weight [out_features, in_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class FourBit:
    """A bitsandbytes 4-bit linear, called as bitsandbytes calls it."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def nbytes(self) -> int:
        state = self._module.weight.quant_state
        return int(self._module.weight.nbytes + state.absmax.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._module(x)
        return y


class PackedFourBit:
    """A 4-bit linear that bitsandbytes has packed for its AVX512-BF16 product.

    Calls the function of bitsandbytes' library where it gives what the operator
    gives, which is tried once: on a few rows the module's and the operator's own
    checks take longer than the product.
    """

    def __init__(self, module: Any) -> None:
        state = module.weight.quant_state
        self._packed = module.weight.data
        self._absmax, self._code = state.absmax, state.code
        self._shape, self._blocksize = list(state.shape), state.blocksize
        self._bias = module.bias
        self._direct = _library_product(str(state.quant_type))
        if self._direct is not None and not self._agrees(self._direct):
            self._direct = None

    @property
    def nbytes(self) -> int:
        return int(self._packed.nbytes + self._absmax.nbytes)

    @property
    def calls_library(self) -> bool:
        """False: it goes through the operator."""
        return self._direct is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._direct is not None and x.stride(1) == 1:
            y = self._call_library(self._direct, x)
        else:
            y = self._call_operator(x)
        return y if self._bias is None else y.add_(self._bias)

    def _call_operator(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
            x, self._packed, self._shape, self._absmax, self._code, self._blocksize
        )
        return y

    def _call_library(self, function: Callable[..., None], x: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self._shape
        y = x.new_empty(x.shape[0], out_features)
        function(
            x.shape[0],
            out_features,
            in_features,
            x.data_ptr(),
            self._packed.data_ptr(),
            self._absmax.data_ptr(),
            y.data_ptr(),
            self._blocksize,
            x.stride(0),
            out_features,
        )
        return y

    def _agrees(self, function: Callable[..., None]) -> bool:
        if self._absmax.dtype != torch.bfloat16:
            return False
        probe = torch.linspace(-1, 1, 2 * self._shape[1]).bfloat16().view(2, -1)
        return torch.equal(self._call_library(function, probe), self._call_operator(probe))


@functools.cache
def _library_product(kind: str) -> Callable[..., None] | None:
    """(rows, out_features, in_features, x, packed, absmax, y, block size, row strides
    of x and y) -> None; None where bitsandbytes is of another release than the one
    whose signature this is, since a wrong one would crash."""
    import bitsandbytes
    from bitsandbytes.cextension import lib

    if not bitsandbytes.__version__.startswith("0.50."):
        return None
    try:
        function = lib[f"gemv_4bit_inference_cpu_{kind}_bf16"]
    except (AttributeError, TypeError, KeyError):
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (*[number] * 3, *[pointer] * 4, *[number] * 3)
    function.restype = None
    found: Callable[..., None] = function
    return found


class SideBySide:
    """Several linears over one input, outputs concatenated: the fallback of `fuse`."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


def fuse(modules: Sequence[nn.Module], dtype: torch.dtype) -> Linear:
    """One `Linear` for modules that share an input; outputs in the given order.

    Args:
        modules: ``nn.Linear`` or bitsandbytes ``Linear4bit``.
        dtype: of the activations; the packed CPU product is used for bfloat16
            alone, since it rounds activations to bfloat16 whatever they are.
    """
    import bitsandbytes as bnb

    if all(isinstance(m, bnb.nn.Linear4bit) for m in modules):
        fused = _fuse_four_bit(modules)
        if fused is not None:
            return _four_bit(fused, dtype)
    elif len(modules) == 1 or not any(isinstance(m, bnb.nn.Linear4bit) for m in modules):
        return _fuse_dense(modules, dtype)
    return SideBySide([fuse([module], dtype) for module in modules])


def _fuse_dense(modules: Sequence[Any], dtype: torch.dtype) -> Dense:
    weight = torch.cat([m.weight.data for m in modules]).to(dtype).contiguous()
    return Dense(weight, _fuse_bias(modules, dtype))


def _fuse_bias(modules: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    if all(m.bias is None for m in modules):
        return None
    parts = [
        m.bias.data if m.bias is not None else m.weight.new_zeros(m.out_features)
        for m in modules
    ]
    return torch.cat(parts).to(dtype)


def _fuse_four_bit(modules: Sequence[Any]) -> Any | None:
    """A Linear4bit over the stacked rows, its nested absmax expanded; None where
    the modules differ in kind or blocks would straddle rows."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, dequantize_blockwise

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
    bias = _fuse_bias(modules, modules[0].compute_dtype or torch.float32)
    fused.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return fused.eval()


def _four_bit(module: Any, dtype: torch.dtype) -> Linear:
    rows, columns = module.weight.quant_state.shape
    fits = rows % 32 == 0 and columns % 64 == 0
    on_cpu = module.weight.device.type == "cpu"
    if not (on_cpu and fits and dtype == torch.bfloat16):
        module.support_avx512bf16_for_cpu = False
    module.compute_dtype, module.compute_type_is_set = dtype, True
    if on_cpu and module.support_avx512bf16_for_cpu:
        # The first evaluation packs the weight in place (bitsandbytes 0.50).
        module(torch.zeros(1, columns, dtype=dtype))
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            return PackedFourBit(module)
    return FourBit(module)
