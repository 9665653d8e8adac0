"""The formats of a base: what the backend loads, and how it came about."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from veneer_server.backends.cuda import weights
from veneer_server.backends.cuda.linears import PackedLinear
from veneer_server.models.checkpoint import e4m3
from veneer_server.models.loader import DecoderWeights

from tests.gpu.engine.simulated import SimulatedDevice


def check(base: Path) -> str:
    """NF4 loaded by bitsandbytes and without it; in words what was compared.

    Raises:
        AssertionError: a tensor differs.
    """
    device = SimulatedDevice(Random(0))
    theirs = weights.load(device, base, quantization="nf4")
    with patch.object(weights, "find_spec", lambda name: None):
        ours = weights.load(device, base, quantization="nf4")
    count = 0
    for mine, other in zip(_packed(ours), _packed(theirs), strict=True):
        for field in fields(mine):
            one, two = getattr(mine, field.name), getattr(other, field.name)
            assert torch.equal(one, two), f"{field.name} of linear {count}"
        count += 1
    return f"{count} linears in NF4, quantized with and without bitsandbytes: the same bits"


def _packed(made: DecoderWeights) -> list[Any]:
    linears: list[Any] = [
        linear
        for layer in made.layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    ]
    assert all(isinstance(linear, PackedLinear) for linear in linears)
    return [linear.weight for linear in linears]


def rounded(base: Path, folder: Path) -> Path:
    """A copy of a base whose linears have the numbers of FP8: served without quantization, it
    is the reference."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            numbers, scales = e4m3.quantize(tensor.bfloat16())
            tensors[name] = (numbers.float() * scales.unsqueeze(1)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
