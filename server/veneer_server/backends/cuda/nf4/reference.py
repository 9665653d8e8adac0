"""Reference for the NF4 kernels, in torch."""

from __future__ import annotations

import torch

from veneer_server.backends.cuda.nf4.packing import BLOCK, PackedNf4


def scales(weight: PackedNf4) -> torch.Tensor:
    """Return the scales, [k, n] float32. They are rounded twice, as in bitsandbytes: never with
    a fused multiply-add."""
    if not weight.nested:
        return weight.scales
    blocks = torch.arange(weight.numbers.shape[0]).unsqueeze(1)
    groups = weight.groups[(weight.first + blocks) >> 8]
    return weight.levels[weight.scales.long()] * groups + weight.offsets


def expand(weight: PackedNf4) -> torch.Tensor:
    """Dequantize a weight: [n, 64 * k] float32."""
    halves = torch.cat((weight.numbers & 15, weight.numbers >> 4), dim=-1)
    numbers = weight.codes[halves.long()] * scales(weight).unsqueeze(-1)
    assert numbers.shape[-1] == BLOCK
    return numbers.transpose(0, 1).reshape(weight.out_features, weight.in_features)


def multiply(x: torch.Tensor, weight: PackedNf4) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply ``x``, [rows, in] bfloat16, by the transposed weight, which is rounded to
    bfloat16 as in the kernels. Returns the product and the sums of its terms' magnitudes, both
    [rows, n] float64."""
    numbers = expand(weight).bfloat16().double()
    return x.double() @ numbers.t(), x.double().abs() @ numbers.t().abs()
