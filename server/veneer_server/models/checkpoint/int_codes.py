"""Weights of GPTQ, AWQ and compressed-tensors, read into `QuantizedMatrix` without changing a
number.

The number of a code is ``scale * (q - zero)``, with a zero point for each group of inputs. In
float32 it is exact: a 16-bit scale has at most 11 significant bits, the difference at most 9.
It is stored as ``scale * q + scale * -zero``, which is the same number, since both products and
the sum are exact. The projects' own code rounds it once more, to the scale's 16 bits.

Sources: GPTQModel's ``BaseQuantLinear.dequantize_weight``, AutoAWQ's ``dequantize_gemm``, and
``pack_quantized`` and ``mxfp4`` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from veneer_server.models.checkpoint.ggml import E2M1, half_powers_of_two
from veneer_server.models.quantized import BlockFactors, QuantizedMatrix, packed_codes
from veneer_server.models.stored_format import StoredWeights

Read = Callable[[str], torch.Tensor | None]
"""Returns a copy of the tensor with this suffix, such as ``qweight``; None if there is none."""

SUFFIXES: Final = {
    "gptq": "qweight",
    "awq": "qweight",
    "int-packed": "weight_packed",
    "mxfp4": "weight_packed",
}
"""The tensor that every quantized linear of a format has."""

_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place of each of eight neighbouring outputs in AWQ's 32 bits."""


class DamagedCodes(ValueError):
    """The tensors of a quantized linear do not fit together."""


def read_linear(stored: StoredWeights, read: Read, shape: tuple[int, int]) -> QuantizedMatrix:
    """Read a linear's weight.

    Args:
        read: reads the linear's tensors.
        shape: (outputs, inputs), as its config says.

    Raises:
        DamagedCodes: a tensor is missing, or has another shape or dtype than its format says.
    """
    match stored.format:
        case "gptq":
            return _gptq(stored, read, shape)
        case "awq":
            return _awq(stored, read, shape)
        case "int-packed":
            return _int_packed(stored, read, shape)
        case "mxfp4":
            return _mxfp4(read, shape)
    raise DamagedCodes(f"{stored.format} is not a format of this module")


def _tensor(
    read: Read, name: str, shape: tuple[int, ...], *dtypes: torch.dtype
) -> torch.Tensor:
    found = read(name)
    if found is None:
        raise DamagedCodes(f"it has no {name}")
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        raise DamagedCodes(
            f"{name} is {list(found.shape)} {str(found.dtype).removeprefix('torch.')}, its "
            f"config says {list(shape)} "
            f"{' or '.join(str(each).removeprefix('torch.') for each in dtypes)}"
        )
    return found


def _groups(stored: StoredWeights, columns: int) -> int:
    group = stored.group or columns
    if columns % group or columns % 8:
        raise DamagedCodes(f"{columns} inputs are not whole groups of {group}")
    return columns // group


def _opened(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8, the lowest bits first."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    data = words.contiguous().view(torch.uint8)
    return torch.stack((data & 0xF, data >> 4), dim=2).view(words.shape[0], -1)


def _scales(read: Read, name: str, shape: tuple[int, int], *, exact: bool) -> torch.Tensor:
    """Read scales. If products with them must be exact (`exact`), 32-bit ones must hold 16-bit
    numbers."""
    found = _tensor(read, name, shape, torch.float16, torch.bfloat16, torch.float32)
    if not bool(found.isfinite().all()):
        raise DamagedCodes(f"{name} has an infinity or a NaN")
    if found.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            narrow = found.to(dtype)
            if torch.equal(narrow.float(), found):
                return narrow
        if exact:
            raise DamagedCodes(
                f"{name} is in float32 beside zero points; save the model in bfloat16"
            )
    return found


def _made(
    codes: torch.Tensor,
    bits: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    middle: int,
    order: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """Make the matrix.

    Args:
        codes: [outputs, inputs] uint8.
        scales: [outputs, groups].
        zeros: [outputs, groups] uint8; None: `middle` for all.
    """
    if zeros is not None and bool((zeros == zeros.view(-1)[0]).all()):
        middle = int(zeros.view(-1)[0])
        zeros = None
    first = 0 if zeros is not None else -middle
    table = torch.arange(first, first + (1 << bits), dtype=torch.float32)
    factors = BlockFactors(scales)
    mins = None
    if zeros is not None:
        integers = torch.int8 if bits == 4 else torch.int16
        mins = BlockFactors(scales, -zeros.to(integers))
    low, high = packed_codes(codes, bits)
    return QuantizedMatrix(codes.shape[1], bits, low, high, table, factors, mins, order)


def _in_order(groups: torch.Tensor | None, columns: int, count: int) -> torch.Tensor | None:
    """Return the order of the inputs by group (``desc_act``): [columns] int64, or None if they
    are in order already."""
    if groups is None:
        return None
    found = groups.to(torch.int64)
    size = columns // count
    if torch.equal(found, torch.arange(columns) // size):
        return None
    if bool((found < 0).any()):
        found = torch.where(found < 0, found + count, found)
    counted = torch.bincount(found.clamp(0, count), minlength=count)
    if len(counted) != count or not bool((counted == size).all()):
        raise DamagedCodes(f"g_idx does not put {size} inputs into each of {count} groups")
    return torch.argsort(found, stable=True)


def _gptq(stored: StoredWeights, read: Read, shape: tuple[int, int]) -> QuantizedMatrix:
    rows, columns = shape
    bits, each, groups = stored.bits, 32 // stored.bits, _groups(stored, columns)
    if rows % each:
        raise DamagedCodes(f"{rows} outputs are not whole words of {each}")
    packed = _tensor(read, "qweight", (columns // each, rows), torch.int32)
    codes = _opened(packed.t(), bits)
    scales = _scales(read, "scales", (groups, rows), exact=True).t().contiguous()
    words = _tensor(read, "qzeros", (groups, rows // each), torch.int32)
    zeros = (_opened(words, bits) + stored.added) & ((1 << bits) - 1)
    order = None
    found = read("g_idx")
    if found is not None:
        if tuple(found.shape) != (columns,):
            raise DamagedCodes(f"g_idx is {list(found.shape)}, not [{columns}]")
        order = _in_order(found, columns, groups)
    if order is not None:
        codes = codes[:, order]
    return _made(codes, bits, scales, zeros.t().contiguous(), 1 << (bits - 1), order)


def _awq(stored: StoredWeights, read: Read, shape: tuple[int, int]) -> QuantizedMatrix:
    rows, columns = shape
    groups = _groups(stored, columns)
    if rows % 8:
        raise DamagedCodes(f"{rows} outputs are not whole words of 8")
    place = torch.tensor(_AWQ_ORDER)

    def opened(words: torch.Tensor) -> torch.Tensor:
        """[n, outputs / 8] int32 -> [outputs, n] uint8."""
        found = _opened(words, 4).view(len(words), -1, 8)[:, :, place]
        return found.reshape(len(words), -1).t().contiguous()

    codes = opened(_tensor(read, "qweight", (columns, rows // 8), torch.int32))
    zeros = opened(_tensor(read, "qzeros", (groups, rows // 8), torch.int32))
    scales = _scales(read, "scales", (groups, rows), exact=True).t().contiguous()
    return _made(codes, 4, scales, zeros, 8)


def _int_packed(stored: StoredWeights, read: Read, shape: tuple[int, int]) -> QuantizedMatrix:
    rows, columns = shape
    bits, each, groups = stored.bits, 32 // stored.bits, _groups(stored, columns)
    own = read("weight_shape")
    if own is not None and own.flatten().tolist() != [rows, columns]:
        raise DamagedCodes(f"weight_shape is {own.flatten().tolist()}, not {[rows, columns]}")
    codes = _opened(_tensor(read, "weight_packed", (rows, columns // each), torch.int32), bits)
    zeros = None
    if read("weight_zero_point") is not None:
        words = _tensor(read, "weight_zero_point", (-(-rows // each), groups), torch.int32)
        zeros = _opened(words.t(), bits)[:, :rows].t().contiguous()
    scales = _scales(read, "weight_scale", (rows, groups), exact=zeros is not None)
    order = None
    found = read("weight_g_idx")
    if found is not None and not bool((found == -1).any()):
        if tuple(found.shape) != (columns,):
            raise DamagedCodes(f"weight_g_idx is {list(found.shape)}, not [{columns}]")
        order = _in_order(found, columns, groups)
    if order is not None:
        codes = codes[:, order]
    return _made(codes, bits, scales, zeros, 1 << (bits - 1), order)


def _mxfp4(read: Read, shape: tuple[int, int]) -> QuantizedMatrix:
    rows, columns = shape
    if columns % 32:
        raise DamagedCodes(f"{columns} inputs are not whole blocks of 32")
    codes = _tensor(read, "weight_packed", (rows, columns // 2), torch.uint8)
    exponents = _tensor(read, "weight_scale", (rows, columns // 32), torch.uint8)
    if bool((exponents == 255).any()):
        raise DamagedCodes("weight_scale has a NaN")
    return QuantizedMatrix(
        columns,
        4,
        codes,
        None,
        torch.tensor(E2M1, dtype=torch.float32),
        BlockFactors(half_powers_of_two(exponents)),
    )
