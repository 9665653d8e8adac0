"""The base's linears on a GPU: NF4 and FP8 by our kernels, dense by cuBLAS.

In exact mode a row's sums have one order whatever else is in the step: packed weights always
use the kernel for few rows, and cuBLAS, which chooses an order by shape, always gets `PANEL`
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import torch

from veneer_server.backends.cuda.device import Device, matmul
from veneer_server.backends.cuda.fp8 import packing as fp8_packing
from veneer_server.backends.cuda.fp8 import panels as fp8_panels
from veneer_server.backends.cuda.fp8 import rows as fp8_rows
from veneer_server.backends.cuda.fp8 import shards as fp8_shards
from veneer_server.backends.cuda.fp8.packing import PackedFp8
from veneer_server.backends.cuda.nf4 import packing as nf4_packing
from veneer_server.backends.cuda.nf4 import panels as nf4_panels
from veneer_server.backends.cuda.nf4 import quantizing as nf4_quantizing
from veneer_server.backends.cuda.nf4 import rows as nf4_rows
from veneer_server.backends.cuda.nf4 import shards as nf4_shards
from veneer_server.backends.cuda.nf4.packing import PackedNf4
from veneer_server.models.config import Quantization
from veneer_server.models.linear import stack_biases

PANEL: Final = 64
"""Most rows of one call of the kernel for few rows, and the rows of every cuBLAS call in exact
mode."""
EXPANDED: Final = 32 << 20
"""Most elements of a packed weight that are expanded at once."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Scratch memory that all linears use in turn.

    Attributes:
        partials: float32, for sums over a part of the inputs.
        panel: bfloat16, for expanded weights.
    """

    partials: torch.Tensor
    panel: torch.Tensor


class CudaLinear(Protocol):
    """A weight [out_features, in_features] in device memory."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and biases."""

    def kept(self, device: Device) -> CudaLinear:
        """Return this linear with its weights in device memory."""

    def part(
        self, outputs: Sequence[slice], inputs: slice, bias: torch.Tensor | None
    ) -> CudaLinear:
        """Return a process's part: some of the outputs and inputs, with this bias. Weights are
        not quantized again.

        Raises:
            ValueError: the part would cut a block of weights that share a scale.
        """

    @property
    def scratch(self) -> tuple[int, int]:
        """Elements that it needs of ``Scratch.partials`` and of ``Scratch.panel``."""

    def multiply(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, scratch: Scratch, *, exact: bool
    ) -> None:
        """Enqueue ``y`` = ``x`` times the transposed weight, plus the bias; both bfloat16,
        [rows, features]. In exact mode rows are a multiple of `PANEL`, see `padded`."""


def padded(count: int) -> int:
    """The next multiple of `PANEL`."""
    return -(-count // PANEL) * PANEL


def _kept(device: Device, bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else device.keep(bias)


def fuse(
    modules: Sequence[Any], dtype: torch.dtype, quantization: Quantization = "none"
) -> CudaLinear:
    """Fuse modules that share an input into one linear, with their outputs in the given order.
    See `models.linear.fuse`.

    Args:
        quantization: the format for weights that are not quantized already.

    Raises:
        ValueError: the kernels cannot read these weights.
    """
    bias = stack_biases(modules, dtype)
    states = [getattr(module.weight, "quant_state", None) for module in modules]
    if all(state is not None for state in states):
        data = [module.weight.data for module in modules]
        return PackedLinear(nf4_packing.pack(list(zip(data, states, strict=True))), bias)
    if any(state is not None for state in states):
        raise ValueError("some weights of a group are quantized and others are not")
    return linear_of([m.weight.data.to(dtype) for m in modules], bias, quantization)


def linear_of(
    weights: Sequence[torch.Tensor], bias: torch.Tensor | None, quantization: Quantization
) -> CudaLinear:
    """Make one linear of weights [out, in] that share an input, quantized without bitsandbytes.

    Raises:
        ValueError: the kernels do not support this quantization.
    """
    match quantization:
        case "none":
            return DenseLinear(torch.cat(list(weights)), bias)
        case "nf4":
            made = [nf4_quantizing.quantize(weight) for weight in weights]
            return PackedLinear(nf4_packing.stack(made), bias)
        case "fp8":
            return PackedLinear(fp8_packing.pack(weights), bias)
    raise ValueError(f"the kernels read nf4, fp8 and unquantized weights, not {quantization}")


class DenseLinear:
    """A `CudaLinear` with an unquantized bfloat16 weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    @property
    def nbytes(self) -> int:
        """See `CudaLinear.nbytes`."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def kept(self, device: Device) -> DenseLinear:
        """See `CudaLinear.kept`."""
        return DenseLinear(device.keep(self.weight), _kept(device, self.bias))

    def part(
        self, outputs: Sequence[slice], inputs: slice, bias: torch.Tensor | None
    ) -> DenseLinear:
        """See `CudaLinear.part`."""
        cut = torch.cat([self.weight[rows, inputs] for rows in outputs])
        return DenseLinear(cut.contiguous(), bias)

    @property
    def scratch(self) -> tuple[int, int]:
        """See `CudaLinear.scratch`."""
        return 0, 0

    def multiply(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, scratch: Scratch, *, exact: bool
    ) -> None:
        """See `CudaLinear.multiply`."""
        step = PANEL if exact else len(x)
        for begin in range(0, len(x), step):
            matmul(device, x[begin : begin + step], self.weight, y[begin : begin + step])
        if self.bias is not None:
            device.call(torch.add, y, self.bias, out=y)


Packed = PackedNf4 | PackedFp8


@dataclass(frozen=True, slots=True)
class _Format:
    """The functions for one format of packed weights."""

    splits: Callable[[Any], int]
    multiply: Callable[..., None]
    expand: Callable[..., None]
    of_outputs: Callable[[Any, Sequence[slice]], Packed]
    of_inputs: Callable[[Any, slice], Packed]


_FORMATS: Final = {
    PackedNf4: _Format(
        nf4_rows.splits,
        nf4_rows.multiply,
        nf4_panels.expand,
        nf4_shards.of_outputs,
        nf4_shards.of_inputs,
    ),
    PackedFp8: _Format(
        fp8_rows.splits,
        fp8_rows.multiply,
        fp8_panels.expand,
        fp8_shards.of_outputs,
        fp8_shards.of_inputs,
    ),
}


class PackedLinear:
    """A `CudaLinear` with a packed weight, NF4 or FP8."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._format = _FORMATS[type(weight)]

    @property
    def nbytes(self) -> int:
        """See `CudaLinear.nbytes`."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def kept(self, device: Device) -> PackedLinear:
        """See `CudaLinear.kept`."""
        names = [field.name for field in fields(self.weight)]
        parts = {name: device.keep(getattr(self.weight, name)) for name in names}
        return PackedLinear(type(self.weight)(**parts), _kept(device, self.bias))

    def part(
        self, outputs: Sequence[slice], inputs: slice, bias: torch.Tensor | None
    ) -> PackedLinear:
        """See `CudaLinear.part`."""
        few = self._format.of_outputs(self.weight, outputs)
        return PackedLinear(self._format.of_inputs(few, inputs), bias)

    @property
    def scratch(self) -> tuple[int, int]:
        """See `CudaLinear.scratch`."""
        partials = self._format.splits(self.weight) * PANEL * self.out_features
        return partials, self._outputs * self.in_features

    @property
    def _outputs(self) -> int:
        """Outputs that are expanded at once, as one panel."""
        return min(self.out_features, max(1, EXPANDED // self.in_features))

    def multiply(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, scratch: Scratch, *, exact: bool
    ) -> None:
        """See `CudaLinear.multiply`."""
        if len(x) > PANEL and not exact:
            self._by_panels(device, x, y, scratch.panel)
            return
        parts = self._format.splits(self.weight)
        for begin in range(0, len(x), PANEL):
            few = x[begin : begin + PANEL]
            shape = (parts, len(few), self.out_features)
            partials = scratch.partials[: parts * len(few) * self.out_features].view(shape)
            device.call(
                self._format.multiply,
                few,
                self.weight,
                self.bias,
                partials,
                y[begin : begin + PANEL],
            )

    def _by_panels(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, memory: torch.Tensor
    ) -> None:
        step = self._outputs
        for begin in range(0, self.out_features, step):
            end = min(begin + step, self.out_features)
            panel = memory[: (end - begin) * self.in_features].view(end - begin, -1)
            device.call(self._format.expand, self.weight, begin, end, panel)
            matmul(device, x, panel, y[:, begin:end])
        if self.bias is not None:
            device.call(torch.add, y, self.bias, out=y)
