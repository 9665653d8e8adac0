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
import numpy.typing as npt
import torch
from veneer_registry.adapter import Projection
from veneer_registry.format import open_stored

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

    with open_stored(folder, source.weights_digest) as (manifest, tensors):
        stage("verify")
        layout = Layout.of(manifest.modules, shapes, num_layers)
        run = torch.empty(layout.length, dtype=dtype, pin_memory=pinned)
        places = {(slot.module.layer, slot.module.projection): slot for slot in layout.slots}
        stage("read")
        same = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        # Numpy moves bits into a transposed view twice as fast as torch casts into one.
        bits = _bits(run)
        for pair in tensors:
            slot = places[pair.module.layer, pair.module.projection]
            rank, fan_in, fan_out = slot.module.rank, slot.fan_in, slot.fan_out
            for view, start, shape, stride in (
                (pair.a, slot.a, (rank, fan_in), (1, slot.a_stride)),
                (pair.b, slot.b, (fan_out, rank), (1, fan_out)),
            ):
                if same[view.dtype] == dtype:
                    size = bits.itemsize
                    steps = (stride[0] * size, stride[1] * size)
                    to = np.ndarray(shape, bits.dtype, bits, start * size, steps)
                    to[:] = np.frombuffer(view.data, bits.dtype).reshape(shape)
                else:
                    _cast(run.as_strided(shape, stride, start), view.dtype, view.data)
    stage("convert")
    return HostCopy(layout, run), stages


def _bits(run: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    """The same memory as raw bits."""
    if run.itemsize == 4:
        return run.view(torch.int32).numpy().view(np.uint32)
    return run.view(torch.int16).numpy().view(np.uint16)


def _cast(target: torch.Tensor, dtype: str, data: memoryview) -> None:
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
