"""Cuts one process's part out of an adapter, with its own layout and run of numbers."""

from __future__ import annotations

import torch

from veneer_server.backends.parallel.sharding import Shard
from veneer_server.models.config import DecoderConfig
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.layout import Layout


def shard_adapter(
    layout: Layout, run: torch.Tensor, config: DecoderConfig, shard: Shard
) -> AdapterTable:
    """Return a process's part of an adapter as a table; see `cut_run`."""
    return AdapterTable(*cut_run(layout, run, config, shard))


def cut_layout(layout: Layout, config: DecoderConfig, shard: Shard) -> Layout:
    """Return the layout of a process's part. ``layout`` and ``config`` are of the whole."""
    modules = [slot.module for slot in layout.slots]
    return Layout.of(modules, shard.config(config).shapes, layout.num_layers)


def cut_run(
    layout: Layout, run: torch.Tensor, config: DecoderConfig, shard: Shard
) -> tuple[Layout, torch.Tensor]:
    """Cut a process's part out of an adapter's run.

    Args:
        layout, run: the whole adapter.
        config: the whole model's config.

    Returns:
        Layout and run of the part. The run is pinned if ``run`` is.
    """
    cut = cut_layout(layout, config, shard)
    pinned = run.is_pinned()
    found = torch.empty(cut.length, dtype=run.dtype, device=run.device, pin_memory=pinned)
    for whole, part in zip(layout.slots, cut.slots, strict=True):
        assert whole.module == part.module
        rank, projection = whole.module.rank, whole.module.projection
        a = run.as_strided((whole.fan_in, rank), (whole.a_stride, 1), whole.a)
        b = run.as_strided((rank, whole.fan_out), (whole.fan_out, 1), whole.b)
        found.as_strided((part.fan_in, rank), (part.a_stride, 1), part.a).copy_(
            a[shard.inputs(projection, whole.fan_in)]
        )
        found.as_strided((rank, part.fan_out), (part.fan_out, 1), part.b).copy_(
            b[:, shard.outputs(projection, whole.fan_out)]
        )
    return cut, found
