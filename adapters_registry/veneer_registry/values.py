"""Checks on the numbers of a tensor, and the bfloat16 rounding that numpy lacks.

With the sign bit cleared, the bit patterns of IEEE floats order as their
magnitudes do: finite < infinity < NaN. So one integer maximum finds the worst
element of a tensor. Since rounding preserves order, casting that element to
the serving dtype tells whether any element overflows there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

ServingDtype = Literal["bfloat16", "float16", "float32"]

MAX_MAGNITUDE: Final = 1e4
"""Largest |x| of an adapter's element. Trained ones stay below 10; beyond this bound, a dot
product over a few thousand inputs leaves fp16's range and harms the rest of the batch."""

_LARGEST_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "F32": int(np.array([MAX_MAGNITUDE], dtype=np.float32).view(np.uint32)[0]),
        "F16": int(np.array([MAX_MAGNITUDE], dtype=np.float16).view(np.uint16)[0]),
        # Truncated, since rounding could exceed it; the other dtypes represent it exactly.
        "BF16": int(np.array([MAX_MAGNITUDE], dtype=np.float32).view(np.uint32)[0]) >> 16,
    }
)
"""Bit pattern of `MAX_MAGNITUDE` by dtype. Anything up to it is finite in every serving dtype,
since float16 ends at 65,504."""

SERVING_BYTES: Final[Mapping[ServingDtype, int]] = MappingProxyType(
    {"bfloat16": 2, "float16": 2, "float32": 4}
)
"""Bytes per element of each dtype that adapters are served in."""


def peak_bits(data: memoryview, dtype: str) -> int:
    """The largest magnitude in ``data`` (little-endian elements), as a bit pattern."""
    if dtype == "F32":
        return int((np.frombuffer(data, dtype="<u4") & np.uint32(0x7FFFFFFF)).max())
    return int((np.frombuffer(data, dtype="<u2") & np.uint16(0x7FFF)).max())


def find_problem(bits: int, dtype: str, serving: ServingDtype) -> str | None:
    """Why a tensor with this peak is refused, or None if it is fine.

    Args:
        bits: maximum of `peak_bits` over the whole tensor.
        dtype: of the tensor in the file.
        serving: dtype it will be cast to; the check covers the cast values.
    """
    if bits <= _LARGEST_BITS[dtype]:
        return None
    value = _value(bits, dtype)
    if math.isnan(value):
        return "contains NaN; retrain with a lower learning rate"
    if math.isinf(value):
        return "contains an infinite value; retrain with a lower learning rate"
    if math.isinf(_cast(value, serving)):
        return f"contains a magnitude of {value:.4g}, which is infinite in {serving}"
    return f"contains a magnitude of {value:.4g}; the largest allowed is {MAX_MAGNITUDE:g}"


def _value(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(np.array([bits], dtype=np.uint16).view(np.float16)[0])
    wide = bits << 16 if dtype == "BF16" else bits
    return float(np.array([wide], dtype=np.uint32).view(np.float32)[0])


def _cast(value: float, serving: ServingDtype) -> float:
    single = np.array([value], dtype=np.float32)
    if serving == "bfloat16":
        wide = to_bfloat16(single).astype(np.uint32) << np.uint32(16)
        return float(wide.view(np.float32)[0])
    if serving == "float16":
        with np.errstate(over="ignore"):
            return float(single.astype(np.float16)[0])
    return value


def to_bfloat16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to bfloat16, nearest with ties to even; the result is raw bits.

    NaN stays NaN: the carry of its rounding must not run into infinity.
    """
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + bias) >> np.uint32(16)).astype(np.uint16)
    quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(array), quiet, rounded)
