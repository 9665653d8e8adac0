"""Cuts one process's part out of a base's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from veneer_server.backends.parallel.sharding import Shard, divided_inputs
from veneer_server.models.config import DecoderConfig
from veneer_server.models.linear import Dense, ServedLinear
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.layout import MEMBERS, Group

Cut = Callable[[ServedLinear, Group, DecoderConfig, Shard], ServedLinear]
"""Returns a process's part of a group's linear. The config is the whole model's."""


def output_ranges(group: Group, config: DecoderConfig, shard: Shard) -> list[slice]:
    """Return a process's outputs of a fused linear: one range for each projection in it."""
    found, begin = [], 0
    for member in MEMBERS[group]:
        size = config.shapes[member][0]
        part = shard.outputs(member, size)
        found.append(slice(begin + part.start, begin + part.stop))
        begin += size
    return found


def shard_dense(
    linear: ServedLinear, group: Group, config: DecoderConfig, shard: Shard
) -> ServedLinear:
    """Implements `Cut` for unquantized weights. If the group is divided by input, only the
    first process keeps the bias, so that the all-reduce adds it once."""
    assert isinstance(linear, Dense), "quantized bases are cut as they are packed"
    ranges = output_ranges(group, config, shard)
    inputs = shard.inputs(MEMBERS[group][0], linear.weight.shape[1])
    weight = torch.cat([linear.weight[rows, inputs] for rows in ranges])
    bias = linear.bias
    if bias is not None:
        bias = torch.cat([bias[rows] for rows in ranges])
        if divided_inputs(MEMBERS[group][0]) and shard.index:
            bias = None
    return Dense(weight.contiguous(), bias)


def shard_weights(
    weights: DecoderWeights, shard: Shard, cut: Cut = shard_dense
) -> DecoderWeights:
    """Return a process's part of a base.

    Raises:
        UnsupportedModel: the model cannot be divided among ``shard.count`` processes.
    """
    config = weights.config

    def part(linear: ServedLinear, group: Group) -> ServedLinear:
        return cut(linear, group, config, shard)

    layers = tuple(
        replace(
            layer,
            qkv=part(layer.qkv, Group.QKV),
            output=part(layer.output, Group.OUTPUT),
            gate_up=part(layer.gate_up, Group.GATE_UP),
            down=part(layer.down, Group.DOWN),
        )
        for layer in weights.layers
    )
    saved = sum(
        one.nbytes - other.nbytes
        for whole, mine in zip(weights.layers, layers, strict=True)
        for one, other in (
            (whole.qkv, mine.qkv),
            (whole.output, mine.output),
            (whole.gate_up, mine.gate_up),
            (whole.down, mine.down),
        )
    )
    return replace(
        weights, config=shard.config(config), layers=layers, nbytes=weights.nbytes - saved
    )
