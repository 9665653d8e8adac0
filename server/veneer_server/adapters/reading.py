"""Reads an adapter's folder into a run of numbers.

Uses numpy and not torch: it runs in loader processes, which do not import torch, since torch's
operators would add a thread pool.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from veneer_registry.adapter import LoraModule, Projection
from veneer_registry.errors import VeneerError
from veneer_registry.stored_adapter import open_unverified
from veneer_registry.values import to_bfloat16
from veneer_registry.weights import TensorView

from veneer_server.step.layout import Layout

Dtype = Literal["bfloat16", "float16", "float32"]

ITEMSIZE: Final[Mapping[Dtype, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}
_STORED: Final[Mapping[Dtype, str]] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_KIND: Final[Mapping[int, str]] = {2: "<u2", 4: "<u4"}
"""Type of a number's raw bits, by its size in bytes."""
_Bits = npt.NDArray[np.unsignedinteger]


def read_run(
    folder: Path,
    digest: str,
    shapes: Mapping[Projection, tuple[int, int]],
    num_layers: int,
    dtype: Dtype,
    begin: Callable[[Sequence[LoraModule], int], memoryview],
    *,
    paired: bool = False,
) -> dict[str, float]:
    """Read, verify and convert an adapter.

    Args:
        shapes: projection -> (out_features, in_features).
        dtype: dtype of the run.
        begin: called with the adapter's modules, not verified yet, and the run's size in bytes;
            returns zeroed memory of that size, into which the run is written.
        paired: see `Layout`.

    Returns:
        The seconds of each stage: ``read`` (locating the tensors), ``convert``, and ``verify``.
        Verification runs in parallel, so ``verify`` is only the extra time after the others.

    Raises:
        AdapterCorrupt: the content does not match its digest.
        DiskFailed: the system cannot read the files now.
    """
    stages: dict[str, float] = {}
    clock = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        stages[name] = now - clock
        clock = now

    with open_unverified(folder, digest) as stored:
        verifying = _Beside(stored.verify)
        try:
            layout = Layout.of(stored.modules, shapes, num_layers, paired=paired)
            memory = begin(stored.modules, layout.length * ITEMSIZE[dtype])
            places = {(s.module.layer, s.module.projection): s for s in layout.slots}
            stage("read")
            for pair in stored.tensors:
                slot = places[pair.module.layer, pair.module.projection]
                rank, fan_in = pair.a.shape
                if paired:
                    shape, strides = (rank, fan_in // 2, 2), (2, 2 * slot.a_stride, 1)
                    _fill(memory, slot.a, shape, strides, pair.a, dtype)
                else:
                    _fill(memory, slot.a, (rank, fan_in), (1, slot.a_stride), pair.a, dtype)
                _fill(memory, slot.b, pair.b.shape, (1, slot.fan_out), pair.b, dtype)
            stage("convert")
        finally:
            verifying.finish()
        stage("verify")
        return stages


class _Beside:
    """Runs a check on its own thread; most of the check does not hold the GIL."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="verify")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._check()
        except (VeneerError, OSError, MemoryError) as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the check, and raise its error if it failed."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _fill(
    memory: memoryview,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    stored: TensorView,
    dtype: Dtype,
) -> None:
    """Write a stored matrix to zeroed memory, in ``dtype``, rounded to nearest with ties to
    even.

    Args:
        shape: shape in which to write the stored numbers.
        start, strides: start and strides of the matrix in ``memory``, in elements.
    """
    size = ITEMSIZE[dtype]
    at, steps = start * size, tuple(step * size for step in strides)
    if stored.dtype == "BF16" and dtype == "float32":
        # A bfloat16 is the upper half of a float32 with a lower half of zeros.
        upper = np.ndarray(shape, "<u2", memory, at + 2, steps)
        upper[:] = np.frombuffer(stored.data, "<u2").reshape(shape)
        return
    to: _Bits = np.ndarray(shape, _KIND[size], memory, at, steps)
    if stored.dtype == _STORED[dtype]:
        to[:] = np.frombuffer(stored.data, _KIND[size]).reshape(shape)
    elif dtype == "bfloat16":
        to[:] = to_bfloat16(_float32(stored)).reshape(shape)
    else:
        numbers = np.float16 if dtype == "float16" else np.float32
        to[:] = _float32(stored).astype(numbers).view(_KIND[size]).reshape(shape)


def _float32(stored: TensorView) -> npt.NDArray[np.float32]:
    if stored.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        half = np.frombuffer(stored.data, "<u2").reshape(stored.shape)
        wide = np.left_shift(half, 16, dtype=np.uint32, casting="unsafe")
        singles: npt.NDArray[np.float32] = wide.view(np.float32)
        return singles
    kind = "<f2" if stored.dtype == "F16" else "<f4"
    return np.frombuffer(stored.data, kind).reshape(stored.shape).astype(np.float32)
