"""Loads the base's weights for the CUDA decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.linears import CudaLinear, fuse
from veneer_server.backends.parallel.sharding import Shard, divided_inputs
from veneer_server.backends.parallel.weights import output_ranges, shard_weights
from veneer_server.models.config import DecoderConfig, Quantization, read_decoder_config
from veneer_server.models.linear import ServedLinear
from veneer_server.models.loader import DecoderWeights, LayerWeights, load_weights
from veneer_server.step.layout import MEMBERS, Group


def load(
    device: Device,
    folder: Path,
    *,
    quantization: Quantization,
    cache_dir: Path | None = None,
    fingerprint: str = "",
    shard: Shard | None = None,
) -> DecoderWeights:
    """Load a base into device memory, with every linear as a `CudaLinear`. See `load_weights`.

    If bitsandbytes is installed, it quantizes to NF4, since that result is kept in
    ``cache_dir``. Without it `nf4.quantizing` does, to the same bits.

    Args:
        shard: the part of the base to load; None for the whole base.

    Raises:
        ValueError: the kernels cannot read these weights.
        UnsupportedModel: the base cannot be divided among the processes.
    """
    own = quantization
    if quantization == "nf4" and find_spec("bitsandbytes") is not None:
        own = "none"
    elif read_decoder_config(folder).quantization is not None:
        own = "none"  # weights that a quantized checkpoint leaves unquantized stay so
    made = load_weights(
        folder,
        quantization="none" if quantization == own else quantization,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        cache_dir=cache_dir,
        fingerprint=fingerprint,
        fuse=partial(_fuse, quantization=own),
    )
    return keep(device, made if shard is None else shard_weights(made, shard, _cut))


def keep(device: Device, made: DecoderWeights) -> DecoderWeights:
    """Copy weights to device memory. Their linears must all be `CudaLinear`."""

    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else device.keep(weight)

    def linear(found: ServedLinear) -> ServedLinear:
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
        dense_embedding=embedding,
        dense_head=head,
        final_norm=device.keep(made.final_norm),
        layers=layers,
    )


def _fuse(
    modules: Sequence[Any], dtype: torch.dtype, quantization: Quantization
) -> ServedLinear:
    return _as_linear(fuse(modules, dtype, quantization))


def _cut(
    linear: ServedLinear, group: Group, config: DecoderConfig, shard: Shard
) -> ServedLinear:
    """See `parallel.weights.Cut`."""
    whole = cast(CudaLinear, linear)
    first = MEMBERS[group][0]
    ranges = output_ranges(group, config, shard)
    bias = whole.bias
    if bias is not None:
        bias = torch.cat([bias[rows] for rows in ranges])
        if divided_inputs(first) and shard.index:
            bias = None  # it is added once
    inputs = shard.inputs(first, whole.in_features)
    return _as_linear(whole.part(ranges, inputs, bias))


def _as_linear(linear: CudaLinear) -> ServedLinear:
    """Cast to the declared type. Only the CUDA decoder uses these weights, and it knows that
    their linears are `CudaLinear`."""
    return cast(ServedLinear, linear)
