"""From an adapter's folder to a run of numbers, in a worker thread.

Works without torch's thread pool where it can: torch operators would start a
second team of threads beside the step's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from veneer_registry.adapter import Projection
from veneer_registry.format import open_tensors, verify_weights

from veneer_server.engine.messages import AdapterSource
from veneer_server.lora.table import Layout

__all__ = ["HostCopy", "read_copy"]


@dataclass(frozen=True, slots=True)
class HostCopy:
    """An adapter in HOST memory: ``run`` is [layout.length], ready to copy."""

    layout: Layout
    run: torch.Tensor


def read_copy(
    source: AdapterSource,
    shapes: Mapping[Projection, tuple[int, int]],
    num_layers: int,
    dtype: torch.dtype,
    *,
    pinned: bool,
) -> tuple[HostCopy, dict[str, float]]:
    """Read, verify and convert; also the seconds of each stage.

    Args:
        dtype: of the copy.
        pinned: page-locked memory, for asynchronous copies to a GPU.

    Raises:
        AdapterCorrupt: the content no longer has its digest.
    """
    folder = Path(source.folder)
    stages: dict[str, float] = {}
    clock = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        stages[name] = now - clock
        clock = now

    # Verifying reads every byte, so that the mapping below finds them in memory.
    manifest = verify_weights(folder, source.weights_digest)
    stage("verify")
    layout = Layout.of(manifest.modules, shapes, num_layers)
    run = torch.empty(layout.length, dtype=dtype, pin_memory=pinned)
    places = {(slot.module.layer, slot.module.projection): slot for slot in layout.slots}
    stage("read")
    with open_tensors(folder, manifest) as tensors:
        for pair in tensors:
            slot = places[pair.module.layer, pair.module.projection]
            rank = slot.module.rank
            a_t = run.as_strided((slot.fan_in, rank), (slot.a_stride, 1), slot.a)
            _fill(a_t.t(), pair.a.dtype, pair.a.data)
            b_t = run[slot.b : slot.b + slot.fan_out * rank].view(rank, slot.fan_out)
            _fill(b_t.t(), pair.b.dtype, pair.b.data)
    stage("convert")
    return HostCopy(layout, run), stages


def _fill(target: torch.Tensor, dtype: str, data: memoryview) -> None:
    """Convert raw little-endian numbers (safetensors dtype) into ``target``."""
    if target.dtype == torch.float32:
        out = target.numpy()
        if dtype == "BF16":
            # A bfloat16 is the upper half of a float32. Straight into a transposed
            # view it would take twice as long as by way of a copy.
            half = np.frombuffer(data, dtype="<u2").reshape(out.shape)
            out.view(np.uint32)[:] = np.left_shift(half, 16, dtype=np.uint32, casting="unsafe")
        else:
            kind = "<f2" if dtype == "F16" else "<f4"
            out[:] = np.frombuffer(data, dtype=kind).reshape(out.shape)
        return
    source = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    target.copy_(torch.frombuffer(data, dtype=source).view(target.shape))
