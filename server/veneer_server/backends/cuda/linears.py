"""The base's linears on a card: NF4 by the kernels, dense by cuBLAS.

In exact mode a row's sums have one order whatever else is in the step: NF4 always takes the
kernel for few rows, and cuBLAS, which chooses an order by shape, always gets `PANEL` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import torch

from veneer_server.backends.cuda.device import Device, matmul
from veneer_server.backends.cuda.nf4 import panels, rows
from veneer_server.backends.cuda.nf4.packing import PackedNf4, pack
from veneer_server.models.linear import stack_biases

__all__ = ["PANEL", "CudaLinear", "DenseLinear", "Nf4Linear", "Scratch", "fuse", "padded"]

PANEL: Final = 64
"""Most rows that the kernel for few rows multiplies at once, and all that a cuBLAS call
multiplies in exact mode."""
EXPANDED: Final = 32 << 20
"""Most numbers of an NF4 weight that are expanded at once."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that linears share, one after the other.

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

    @property
    def nbytes(self) -> int:
        """Bytes of weights and biases."""

    def kept(self, device: Device) -> CudaLinear:
        """With its weights in device memory."""

    @property
    def scratch(self) -> tuple[int, int]:
        """Elements that it needs of each part of `Scratch`."""

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


def fuse(modules: Sequence[Any], dtype: torch.dtype) -> CudaLinear:
    """One linear for modules that share an input; outputs in the given order. See
    `models.linear.fuse`.

    Raises:
        ValueError: the kernels do not read these weights.
    """
    bias = stack_biases(modules, dtype)
    states = [getattr(module.weight, "quant_state", None) for module in modules]
    if all(state is not None for state in states):
        data = [module.weight.data for module in modules]
        return Nf4Linear(pack(list(zip(data, states, strict=True))), bias)
    if any(state is not None for state in states):
        raise ValueError("some weights of a group are quantized and others are not")
    return DenseLinear(torch.cat([m.weight.data for m in modules]).to(dtype), bias)


class DenseLinear:
    """An unquantized weight, bfloat16."""

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


class Nf4Linear:
    """A packed NF4 weight."""

    def __init__(self, weight: PackedNf4, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.out_features, weight.in_features

    @property
    def nbytes(self) -> int:
        """See `CudaLinear.nbytes`."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def kept(self, device: Device) -> Nf4Linear:
        """See `CudaLinear.kept`."""
        parts = {f.name: device.keep(getattr(self.weight, f.name)) for f in fields(PackedNf4)}
        return Nf4Linear(PackedNf4(**parts), _kept(device, self.bias))

    @property
    def scratch(self) -> tuple[int, int]:
        """See `CudaLinear.scratch`."""
        partials = rows.splits(self.weight) * PANEL * self.out_features
        return partials, self._outputs * self.in_features

    @property
    def _outputs(self) -> int:
        """Of a panel."""
        return min(self.out_features, max(1, EXPANDED // self.in_features))

    def multiply(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, scratch: Scratch, *, exact: bool
    ) -> None:
        """See `CudaLinear.multiply`."""
        if len(x) > PANEL and not exact:
            self._by_panels(device, x, y, scratch.panel)
            return
        parts = rows.splits(self.weight)
        for begin in range(0, len(x), PANEL):
            few = x[begin : begin + PANEL]
            shape = (parts, len(few), self.out_features)
            partials = scratch.partials[: parts * len(few) * self.out_features].view(shape)
            device.call(
                *(rows.multiply, few, self.weight, self.bias, partials),
                y[begin : begin + PANEL],
            )

    def _by_panels(
        self, device: Device, x: torch.Tensor, y: torch.Tensor, memory: torch.Tensor
    ) -> None:
        step = self._outputs
        for begin in range(0, self.out_features, step):
            end = min(begin + step, self.out_features)
            panel = memory[: (end - begin) * self.in_features].view(end - begin, -1)
            device.call(panels.expand, self.weight, begin, end, panel)
            matmul(device, x, panel, y[:, begin:end])
        if self.bias is not None:
            device.call(torch.add, y, self.bias, out=y)
