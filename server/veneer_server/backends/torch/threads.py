"""How many CPU threads an operator gets: all for large GEMMs, one for the rest.

Waking OpenMP's thread pool, which sleeps at barriers, costs 75 us (2 cores, virtual
machine), and a step on a small model has thousands of operators shorter than that:
a LoRA GEMM of 4 rows took 6 us on one thread and 20 to 100 us on two. Threads that
spin instead make every step two to three times as long beside one busy process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch

from veneer_server.models.packed import torch_threads

POOL_WORK: Final = 10_000_000
"""Multiplications from which a GEMM is worth the thread pool: 0.2 to 0.4 ms on one thread
(4-bit weights, AVX512-BF16). Whole steps of 8 rows were fastest from about here on, and
the other core stays free for the front process meanwhile."""

SMALL_STEP: Final = 4_000_000
"""Steps run on one thread if their widest activation has at most this many elements, since
element-wise operators are then slower on several: a norm of 320 rows of 576 took 80 us on one
thread and 380 us on two."""


class Threads:
    """Sets the size of the calling thread's thread pool (0.2 us per switch). Does nothing on
    CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._all = torch.get_num_threads()
        self._switches = device.type == "cpu" and self._all > 1
        self._narrow = False

    @contextmanager
    def step(self, numbers: int) -> Iterator[None]:
        """Context for a step whose widest activation has ``numbers`` elements."""
        self._narrow = self._switches and numbers <= SMALL_STEP
        with torch_threads(1) if self._narrow else nullcontext():
            yield

    def product(self, work: int) -> AbstractContextManager[None]:
        """Context for a GEMM of ``work`` multiplications, or for several of that size each."""
        if not self._switches or self._narrow == (work < POOL_WORK):
            return nullcontext()
        return torch_threads(1 if work < POOL_WORK else self._all)
