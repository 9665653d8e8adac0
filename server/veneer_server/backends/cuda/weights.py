"""The base's weights as the decoder for CUDA reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.linears import CudaLinear, fuse
from veneer_server.models.config import Quantization
from veneer_server.models.linear import Linear
from veneer_server.models.loader import DecoderWeights, LayerWeights, load_weights

__all__ = ["load"]


def load(
    device: Device,
    folder: Path,
    *,
    quantization: Quantization,
    cache_dir: Path | None = None,
    fingerprint: str = "",
) -> DecoderWeights:
    """See `load_weights`; every linear is a `CudaLinear`, and all is in device memory.

    Raises:
        ValueError: the kernels do not read these weights.
    """
    made = load_weights(
        folder,
        quantization=quantization,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        cache_dir=cache_dir,
        fingerprint=fingerprint,
        fuse=_fuse,
    )

    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else device.keep(weight)

    def linear(found: Linear) -> Linear:
        return _as_linear(cast(CudaLinear, found).kept(device))

    layers = tuple(
        LayerWeights(
            input_norm=device.keep(layer.input_norm),
            post_norm=device.keep(layer.post_norm),
            query_norm=norm(layer.query_norm),
            key_norm=norm(layer.key_norm),
            qkv=linear(layer.qkv),
            output=linear(layer.output),
            gate_up=linear(layer.gate_up),
            down=linear(layer.down),
        )
        for layer in made.layers
    )
    embedding = device.keep(made.embedding)
    head = embedding if made.config.tied_head else device.keep(made.head)
    return replace(
        made,
        device=device.torch_device,
        embedding=embedding,
        dense_head=head,
        final_norm=device.keep(made.final_norm),
        layers=layers,
    )


def _fuse(modules: Sequence[Any], dtype: torch.dtype) -> Linear:
    return _as_linear(fuse(modules, dtype))


def _as_linear(linear: CudaLinear) -> Linear:
    """Nothing but the decoder for CUDA, which knows, calls the linears of these weights."""
    return cast(Linear, linear)
