"""Load in this process instead of a loader process, so that faults can be injected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from veneer_registry.adapter import LoraModule
from veneer_server.adapters.loaders import HostCopy
from veneer_server.adapters.reading import read_run
from veneer_server.step.layout import Layout
from veneer_server.wire.messages import AdapterSource


def load_here(
    source: AdapterSource, shapes: Mapping[Any, tuple[int, int]], layers: int
) -> HostCopy:
    """Load the copy in float32. Raises as `read_run`."""
    memory, adapted = bytearray(), list[LoraModule]()

    def begin(modules: Sequence[LoraModule], size: int) -> memoryview:
        adapted.extend(modules)
        memory.extend(bytes(size))
        return memoryview(memory)

    folder = Path(source.folder)
    read_run(folder, source.weights_digest, shapes, layers, "float32", begin)
    run = torch.frombuffer(memory, dtype=torch.float32)
    return HostCopy(Layout.of(adapted, shapes, layers), run)
