"""Calls the compiled library's functions (``cpp/library.cpp``)."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.native import kept
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.structs import (
    Field,
    Layer,
    Linear,
    LoraAdapter,
    LoraGroup,
    LoraMember,
    Model,
    SampleRow,
    Segment,
    Step,
    mismatch,
)

__all__ = [
    "BFLOAT16",
    "BLOCK",
    "EIGHT_BIT",
    "FOUR_BIT",
    "STORED",
    "Layer",
    "Library",
    "Linear",
    "LoraAdapter",
    "LoraGroup",
    "LoraMember",
    "Model",
    "SampleRow",
    "Segment",
    "Step",
    "address",
]

FOUR_BIT: Final = 0
BFLOAT16: Final = 1
EIGHT_BIT: Final = 2
BLOCK: Final = 64
"""Inputs are divided into blocks of this size."""

# The result and argument types of each function in ``cpp/library.cpp``.
SIGNATURES: Final[dict[str, tuple[Any, Sequence[Any]]]] = {
    "veneer_fields": (ctypes.POINTER(Field), ()),
    "veneer_instructions": (c_char_p, ()),
    "veneer_permit": (c_int32, ()),
    "veneer_packed_bytes": (c_int64, (c_int32, c_int32, c_int32)),
    "veneer_layout": (c_int32, ()),
    "veneer_quantize": (
        c_int32,
        (c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
    ),
    "veneer_pack_four_bit": (
        c_int32,
        (c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_int32),
    ),
    "veneer_pack_eight_bit": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_int32)),
    "veneer_pack_bf16": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_int32)),
    "veneer_multiply": (None, (ctypes.POINTER(Linear), c_void_p, c_int64, c_void_p)),
    "veneer_create": (c_int32, (ctypes.POINTER(Model), c_int32, ctypes.POINTER(c_void_p))),
    "veneer_bind": (c_int32, (c_void_p, c_int32, c_void_p, c_int32)),
    "veneer_destroy": (None, (c_void_p,)),
    "veneer_step": (c_int32, (c_void_p, ctypes.POINTER(Step))),
    "veneer_sample": (c_int32, (c_void_p, ctypes.POINTER(SampleRow), c_int64, c_int64)),
    "veneer_log_sums": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    "veneer_times": (None, (c_void_p, c_void_p)),
}


STORED: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The values of ``Stored`` in ``cpp/kernels/gemm/quantize.h``."""


class Status(IntEnum):
    """Result of a function that can fail; ``Status`` in ``cpp/library.cpp``."""

    OK = 0
    NO_MEMORY = 1
    NO_THREADS = 2
    INTERNAL = 3


SENTENCES: Final = {
    Status.NO_MEMORY: "there is not enough memory for the buffers of {}",
    Status.NO_THREADS: "the threads of {} cannot be started",
    Status.INTERNAL: "an unexpected C++ exception ended {}",
}
"""The message of each failure, with a placeholder for what was being done."""


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data; the caller must keep the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class _HugePages:
    """Allocates memory for weights, in pages of 2 MB if the system has them: with these, one
    thread reads 29 GB/s instead of 20, and two threads 35 instead of 30. Many small linears
    share a piece of memory, and none is ever freed alone."""

    _PIECE: Final = 32 << 20
    _LINE: Final = 64

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """Allocate ``size`` bytes, aligned to a cache line."""
        begin = -(-self._used // self._LINE) * self._LINE
        if begin + size > len(self._piece):
            # Private: memory that could be shared with other processes gets no huge pages.
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            try:
                memory = mmap.mmap(-1, max(size, self._PIECE), flags=kind)
            except OSError as error:
                raise MemoryError(f"there is no memory for {size} bytes of weights") from error
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # the kernel has no huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._piece, begin = torch.frombuffer(memory, dtype=torch.uint8), 0
        self._used = begin + size
        return self._piece[begin : self._used]


class Library:
    """A loaded library and its functions.

    Raises:
        NativeUnavailable: the file cannot be loaded, is of another version, or needs matrix
            registers that the operating system denies.
    """

    def __init__(self, file: Path) -> None:
        self._memory = _HugePages()
        try:
            # Load the file that was checked, even if its name refers to another one by now. The
            # descriptor stays open: the dynamic loader identifies libraries by name, and must
            # not see the same name for two of them.
            self.fd = kept.open_checked(file)
            self.functions = functions = ctypes.CDLL(f"/proc/self/fd/{self.fd}")
        except (OSError, kept.FileRefused) as error:
            raise NativeUnavailable(
                f"the compiled kernels cannot be loaded: {error}"
            ) from error
        try:
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(functions, name)
                function.restype, function.argtypes = result, list(arguments)
        except AttributeError as error:
            raise NativeUnavailable(
                f"the compiled kernels are from another version: {error}"
            ) from None
        if differs := mismatch(functions.veneer_fields()):
            raise NativeUnavailable(f"the compiled kernels expect different structs: {differs}")
        if not functions.veneer_permit():
            raise NativeUnavailable(
                "the operating system does not let this process use the matrix registers: "
                "serve with --native-instructions avx512-bf16"
            )

    @property
    def instructions(self) -> str:
        """The form's name: ``avx2`` or another of `forms.FORMS`."""
        return str(self.functions.veneer_instructions().decode())

    @property
    def layout(self) -> int:
        """The version of the layout of packed weights."""
        return int(self.functions.veneer_layout())

    def packed_bytes(self, kind: int, outputs: int, inputs: int) -> int:
        """Return the size of a packed weight in bytes."""
        return int(self.functions.veneer_packed_bytes(kind, outputs, inputs))

    def quantize(
        self,
        weights: torch.Tensor,
        bounds: torch.Tensor,
        book: torch.Tensor,
        threads: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a weight [outputs, inputs] in blocks of 64, as bitsandbytes does.

        Args:
            weights: bfloat16, float16 or float32; inputs are a multiple of 64.
            bounds: [15] float32, bounds between neighbours of the code book's sorted numbers.
            book: [16] uint8, the codes of the sorted numbers.

        Returns:
            Codes and scales as `pack_four_bit` takes them.
        """
        outputs, inputs = weights.shape
        codes = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
        scales = torch.empty(outputs, inputs // BLOCK)
        status = self.functions.veneer_quantize(
            address(weights),
            STORED[weights.dtype],
            scales.numel(),
            address(bounds),
            address(book),
            address(codes),
            address(scales),
            threads,
        )
        check(status, "quantizing weights")
        return codes, scales

    def pack_four_bit(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        *,
        to: torch.Tensor | None = None,
        threads: int = 1,
    ) -> torch.Tensor:
        """Pack a 4-bit weight for the kernels.

        Args:
            codes: [outputs, inputs / 2] uint8, the earlier of two neighbours in the high half.
            scales: [outputs, inputs / 64] float32.
            to: memory for the result, aligned to a cache line; allocated by default.
        """
        outputs, inputs = codes.shape[0], 2 * codes.shape[1]
        packed = self._packed(FOUR_BIT, outputs, inputs, to)
        status = self.functions.veneer_pack_four_bit(
            address(codes), address(scales), outputs, inputs, address(packed), threads
        )
        check(status, "packing weights")
        return packed

    def pack_dense(
        self,
        kind: int,
        weight: torch.Tensor,
        *,
        to: torch.Tensor | None = None,
        threads: int = 1,
    ) -> torch.Tensor:
        """Pack a bfloat16 weight for the kernels.

        Args:
            kind: `BFLOAT16`, or `EIGHT_BIT` in blocks of 64 with a scale each.
            weight: [outputs, inputs] bfloat16.
            to: as for `pack_four_bit`.
        """
        outputs, inputs = weight.shape
        packed = self._packed(kind, outputs, inputs, to)
        functions = self.functions
        pack = (
            functions.veneer_pack_bf16 if kind == BFLOAT16 else functions.veneer_pack_eight_bit
        )
        status = pack(address(weight), outputs, inputs, address(packed), threads)
        check(status, "packing weights")
        return packed

    def _packed(
        self, kind: int, outputs: int, inputs: int, to: torch.Tensor | None
    ) -> torch.Tensor:
        size = self.packed_bytes(kind, outputs, inputs)
        if to is None:
            return self._memory.take(size)
        assert to.nbytes == size
        return to

    def bytes(self, size: int) -> torch.Tensor:
        """Allocate ``size`` bytes in huge pages, zeroed and aligned to a cache line."""
        return self._memory.take(size)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a zeroed tensor in huge pages."""
        size = math.prod(shape) * dtype.itemsize
        return self._memory.take(size).view(dtype).view(*shape)

    def multiply(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x``, [rows, inputs] bfloat16, by a packed weight on the calling thread.
        Returns [rows, outputs] float32."""
        y = torch.empty(len(x), linear.outputs)
        self.functions.veneer_multiply(ctypes.byref(linear), address(x), len(x), address(y))
        return y

    def create(self, model: Model, threads: int) -> int:
        """Create an engine over ``model``, which the caller must keep alive, and return its
        handle.

        Raises:
            NativeUnavailable: there is not enough memory, or the threads cannot be started.
        """
        engine = c_void_p()
        status = self.functions.veneer_create(
            ctypes.byref(model), threads, ctypes.byref(engine)
        )
        if status != Status.OK:
            raise NativeUnavailable(_sentence(status, f"a decoder on {threads} threads"))
        assert engine.value is not None
        return engine.value

    def bind(self, engine: int, thread: int, cpus: Sequence[int]) -> bool:
        """Bind a thread to these CPUs. Thread 0 is the one that calls `step`; it is only bound
        during steps. Returns False if the system refuses."""
        numbers = (c_int32 * len(cpus))(*cpus)
        return bool(self.functions.veneer_bind(engine, thread, numbers, len(cpus)))

    def step(self, engine: int, step: Step) -> None:
        """Execute a step.

        Raises:
            MemoryError: there is not enough memory for the step's buffers.
        """
        check(self.functions.veneer_step(engine, ctypes.byref(step)), "a step")

    def sample(self, engine: int | None, draws: ctypes.Array[SampleRow], vocab: int) -> None:
        """Sample the token of each row, and write it to the row's ``token``.

        Raises:
            MemoryError: there is not enough memory for the probabilities.
        """
        check(self.functions.veneer_sample(engine, draws, len(draws), vocab), "sampling tokens")

    def log_sums(
        self, engine: int | None, logits: int | None, shape: Sequence[int], to: int | None
    ) -> None:
        """Compute log(sum of e^logit) of each row.

        Args:
            logits: address of [rows, vocab] float32.
            shape: (rows, vocab).
            to: address of [rows] float32, for the results.
        """
        rows, vocab = shape
        check(
            self.functions.veneer_log_sums(engine, logits, rows, vocab, to),
            "summing probabilities",
        )

    def destroy(self, engine: int) -> None:
        """Destroy an engine and end its threads."""
        self.functions.veneer_destroy(engine)


def _sentence(status: int, what: str) -> str:
    return SENTENCES[Status(status)].format(what)


def check(status: int, what: str) -> None:
    """Raise MemoryError or RuntimeError if a status reports a failure."""
    if status == Status.NO_MEMORY:
        raise MemoryError(_sentence(status, what))
    if status != Status.OK:
        raise RuntimeError(_sentence(status, what))


def pointer(array: NDArray[np.int64]) -> int:
    """Return the address of a step's array; the caller must keep the array alive."""
    assert array.flags.c_contiguous
    assert array.dtype == np.int64
    return int(array.ctypes.data)
