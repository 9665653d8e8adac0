"""Compute the least work of a decoding step (reads and multiplications), by part of
``decoder.h``.

A step reads each packed weight, each adapter of the batch and each sequence's keys and values
once. Activations stay in caches and are not counted; written logits are not counted either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from veneer_registry.adapter import Projection
from veneer_server.models.config import DecoderConfig

from tests.bench.limits import Work
from tests.bench.steps import RANK

_BITS: Final = {"nf4": 4, "8-bit": 8, "bf16": 16}
_BYTES: Final = 2  # per bfloat16 number
_GROUPS: Final[dict[str, tuple[Projection, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "gateup": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The projections that are computed in one GEMM, by part."""
SHRINKS: Final = tuple(_GROUPS)
"""Parts that multiply by A, in addition to the base's weights."""
EXPANDS: Final = ("norm", "rotate", "gate")
"""Parts that also multiply by B, in this order: of o and down; of q, k and v; of gate and
up."""
_EXPANDED_IN: Final = {"qkv": "rotate", "output": "norm", "gateup": "gate", "down": "norm"}


def packed_bytes(kind: str, outputs: int, inputs: int) -> float:
    """Return the bytes of a weight: its numbers and, unless in bf16, a float scale per 64 of
    them."""
    return outputs * inputs * (_BITS[kind] / 8 + (0 if kind == "bf16" else 4 / 64))


def kernel_work(kind: str, outputs: int, inputs: int, rows: int) -> Work:
    """Return the work of one GEMM."""
    return Work(packed_bytes(kind, outputs, inputs), 2.0 * rows * outputs * inputs)


def base_work(config: DecoderConfig, rows: int, context: int) -> dict[str, Work]:
    """Return the work of a step without adapters, by part; other parts do almost nothing."""
    layers, shapes = config.num_layers, config.shapes
    parts = {}
    for part, projections in _GROUPS.items():
        outputs = sum(shapes[name][0] for name in projections)
        inputs = shapes[projections[0]][1]
        one = kernel_work("nf4", outputs, inputs, rows)
        parts[part] = Work(layers * one.bytes, layers * one.flops)
    seen = float(rows * context * layers * config.head_dim)
    parts["attend"] = Work(2 * _BYTES * seen * config.num_kv_heads, 4 * seen * config.num_heads)
    parts["head"] = kernel_work("8-bit", config.vocab_size, config.hidden_size, rows)
    return parts


def adapter_work(config: DecoderConfig, rows: int, adapters: int) -> Mapping[str, Work]:
    """Return the work of ``adapters`` adapters on all projections, by part."""
    parts: dict[str, Work] = {}
    for group, projections in _GROUPS.items():
        for name in projections:
            outputs, inputs = config.shapes[name]
            for part, width in ((group, inputs), (_EXPANDED_IN[group], outputs)):
                numbers = float(config.num_layers * RANK * width)
                work = Work(adapters * _BYTES * numbers, 2 * rows * numbers)
                parts[part] = parts.get(part, Work()).plus(work)
    return parts
