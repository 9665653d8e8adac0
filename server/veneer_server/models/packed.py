"""4-bit linears, packed by bitsandbytes for its AVX512-BF16 GEMM.

That GEMM suits few rows. For many rows, some CPUs multiply float32 twice as fast as
bfloat16: on these the weights are first expanded to float32, a slice at a time.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

log = logging.getLogger(__name__)

MANY_ROWS: Final = 128
"""Least number of rows for which expanding is tried. Expanding takes as long as the GEMM of 50
rows (Xeon, AVX512-BF16, 2 cores), so it gains little with fewer than twice as many."""

SLICE: Final = 4_000_000
"""Elements expanded at a time: 16 MB, which holds a whole linear of a small model."""


class PackedFourBit:
    """A 4-bit linear that bitsandbytes has packed for its AVX512-BF16 GEMM.

    Calls the function of bitsandbytes' library directly, if one trial shows that it gives the
    same result as the operator: with few rows, the module's and the operator's own checks take
    longer than the GEMM.

    Args:
        expands: whether `MANY_ROWS` rows or more are multiplied in float32.
    """

    def __init__(self, module: Any, *, expands: bool = False) -> None:
        state = module.weight.quant_state
        self.packed = module.weight.data
        self._absmax, self._code = state.absmax, state.code
        self._kind = str(state.quant_type)
        self._shape, self._blocksize = list(state.shape), state.blocksize
        self._bias = module.bias
        self._expands = expands
        self._direct = _library_product(self._kind)
        if self._direct is not None and not self._agrees(self._direct):
            self._direct = None

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self._absmax.nbytes)

    @property
    def calls_library(self) -> bool:
        """Whether it calls the library directly, rather than the operator."""
        return self._direct is not None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in float32 if weights will be expanded, otherwise in bfloat16."""
        return x.float() if self._expands and len(x) >= MANY_ROWS else x.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features], in x's dtype."""
        wide = x.dtype == torch.float32
        y = self._multiply_expanded(x) if wide else self._multiply_packed(x)
        return y if self._bias is None else y.add_(self._bias)

    def _multiply_packed(self, x: torch.Tensor) -> torch.Tensor:
        if self._direct is not None and x.stride(1) == 1:
            return self._call_library(self._direct, x)
        return self._call_operator(x)

    def _call_operator(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
            x, self.packed, self._shape, self._absmax, self._code, self._blocksize
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
            self.packed.data_ptr(),
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

    def _multiply_expanded(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), self._shape[0])
        for rows in row_slices(*self._shape):
            expanded = self._expand(rows.start, rows.stop)
            torch.mm(x, expanded.t(), out=y[:, rows])
        return y

    def expanded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """See `ServedLinear.expanded`. Packing has rounded the scales to bfloat16."""
        for rows in row_slices(*self._shape):
            yield self._expand(rows.start, rows.stop), rows_of(self._bias, rows)

    def _expand(self, begin: int, end: int) -> torch.Tensor:
        """Expand rows ``begin`` to ``end``, multiples of 32: [end - begin, in_features]
        float32."""
        # One thread, since each of these dozen short operators would wake the thread pool.
        with torch_threads(1):
            codes = _unpacked(self.packed[begin:end])
            scales = self._absmax[:, begin:end].t().float().contiguous()
            weights: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
                codes,
                scales.view(-1),
                self._blocksize,
                self._kind,
                [end - begin, self._shape[1]],
                torch.float32,
            )
            return weights


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of all rows of a weight in order, about `SLICE` elements at a time; each
    slice begins at a multiple of 32, and ends at one or after the last row."""
    step = max(SLICE // columns // 32, 1) * 32
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def rows_of(bias: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Return the biases of some rows in float32; None if there are no biases."""
    return None if bias is None else bias[rows].float()


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes in the order of bitsandbytes' quantizer: [rows, in_features / 2] uint8,
    with the earlier of two neighbours in the high half of a byte.

    In the packed form, a run of 32 bytes holds two neighbouring columns of 32 rows: byte 2 i
    belongs to the even column and byte 2 i + 1 to the odd one, each with row i in the low half
    and row i + 16 in the high half.
    """
    rows, pairs = packed.shape
    # [blocks, 16, pairs]: both bytes of rows i and i + 16
    both = packed.view(torch.int16).view(rows // 32, pairs, 16).transpose(1, 2).contiguous()
    even = both.to(torch.uint8)
    odd = both.bitwise_right_shift_(8).to(torch.uint8)
    codes = torch.empty(rows // 32, 2, 16, pairs, dtype=torch.uint8)
    torch.bitwise_or((even & 0xF).mul_(16), odd & 0xF, out=codes[:, 0])
    torch.bitwise_or(even.bitwise_and_(0xF0), odd.bitwise_right_shift_(4), out=codes[:, 1])
    return codes.view(rows, pairs)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's operators on this thread use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def expanding_pays() -> bool:
    """Whether this CPU multiplies many rows faster in float32, expanding included.

    Measured once per process (0.1 s): it depends on how fast the bfloat16 dot product
    is, which no CPU flag tells. Compared with float32, some Xeons do half as many operations
    per second, and a Zen 4 twice as many.
    """
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(1024, 1024, bias=False, compute_dtype=torch.bfloat16)
    module = module.to("cpu").eval()
    x = torch.ones(2 * MANY_ROWS, 1024, dtype=torch.bfloat16)
    module(x[:1])
    if not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        return False
    packed, expanded = (PackedFourBit(module, expands=expands) for expands in (False, True))
    few, many = _seconds(packed, x), _seconds(expanded, x)
    log.info(
        "steps of %d rows or more multiply in %s: %.1f against %.1f ms for %d rows",
        MANY_ROWS,
        "float32" if many < few else "bfloat16",
        1000 * min(few, many),
        1000 * max(few, many),
        len(x),
    )
    return many < few


def _seconds(linear: PackedFourBit, x: torch.Tensor) -> float:
    """Return the seconds of the fastest of five calls: the one disturbed least by other
    processes."""
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        linear(linear.rounded(x))
        took.append(time.perf_counter() - begin)
    return min(took)


@functools.cache
def _library_product(kind: str) -> Callable[..., None] | None:
    """Return the GEMM function of bitsandbytes' library: (rows, out_features, in_features, x,
    packed, absmax, y, block size, row strides of x and y) -> None.

    Return None if bitsandbytes is not of the release known to have this signature, since a call
    with a wrong one would crash."""
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
