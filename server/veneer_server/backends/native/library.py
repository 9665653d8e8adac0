"""The compiled library's functions and structs (``cpp/step.h``, ``cpp/library.cpp``)."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_uint16, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.native import kept
from veneer_server.backends.native.compiler import NativeUnavailable

__all__ = [
    "BFLOAT16",
    "BLOCK",
    "EIGHT_BIT",
    "FOUR_BIT",
    "Draw",
    "Layer",
    "Library",
    "Linear",
    "LoraAdapter",
    "LoraGroup",
    "LoraMember",
    "Model",
    "Segment",
    "Step",
    "address",
]

FOUR_BIT: Final = 0
BFLOAT16: Final = 1
EIGHT_BIT: Final = 2
BLOCK: Final = 64
"""Inputs are cut into blocks of so many."""

_Fields = Sequence[tuple[str, Any]]


class Linear(ctypes.Structure):
    """A packed weight."""

    _fields_: ClassVar[_Fields] = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("kind", c_int32),
        ("parts", c_int32),
        ("table", c_uint16 * 16),
    ]


class Layer(ctypes.Structure):
    """A layer's weights and its part of the cache."""

    _fields_: ClassVar[_Fields] = [
        ("linears", Linear * 4),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    ]


class Model(ctypes.Structure):
    """The base model."""

    _fields_: ClassVar[_Fields] = [
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("inv_freq", c_void_p),
        ("head", Linear),
        ("layer_count", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("vocab", c_int32),
        ("block_size", c_int32),
        ("epsilon", c_float),
        ("rotary_scale", c_float),
    ]


class LoraMember(ctypes.Structure):
    """One adapted projection."""

    _fields_: ClassVar[_Fields] = [
        ("b", c_void_p),
        ("rank", c_int32),
        ("first", c_int32),
        ("scaling", c_float),
        ("reserved", c_int32),
    ]


class LoraGroup(ctypes.Structure):
    """An adapter in one group of one layer."""

    _fields_: ClassVar[_Fields] = [
        ("a", c_void_p),
        ("ranks", c_int32),
        ("reserved", c_int32),
        ("members", LoraMember * 3),
    ]


class LoraAdapter(ctypes.Structure):
    """An adapter."""

    _fields_: ClassVar[_Fields] = [
        ("groups", ctypes.POINTER(LoraGroup)),
        ("is_float", c_int32),
        ("reserved", c_int32),
    ]


class Segment(ctypes.Structure):
    """Neighbouring rows with one adapter."""

    _fields_: ClassVar[_Fields] = [
        ("begin", c_int64),
        ("end", c_int64),
        ("adapter", ctypes.POINTER(LoraAdapter)),
    ]


class Step(ctypes.Structure):
    """`StepArrays`, and where its logits go."""

    _fields_: ClassVar[_Fields] = [
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("row_starts", c_void_p),
        ("contexts", c_void_p),
        ("block_tables", c_void_p),
        ("segments", ctypes.POINTER(Segment)),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("finite", c_void_p),
        ("rows", c_int64),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("segment_count", c_int64),
        ("logit_count", c_int64),
    ]


class Draw(ctypes.Structure):
    """A row of logits, and how its token is drawn."""

    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("seed", c_uint64),
        ("position", c_uint64),
        ("top_p", c_double),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("min_p", c_float),
        ("token", c_int64),
    ]


_STRUCTS: Final = (Linear, Layer, Model, Step, Segment, LoraAdapter, LoraGroup, Draw)


def address(tensor: torch.Tensor | None) -> int | None:
    """Of a tensor's numbers; the caller keeps the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class _HugePages:
    """Memory for weights in pages of 2 MB where the system has them: one thread read 29 GB/s
    in place of 20 then, two 35 in place of 30. Many small linears share a piece, and none is
    ever given back alone."""

    _PIECE: Final = 32 << 20
    _LINE: Final = 64

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """So many bytes that begin with a line of the cache."""
        begin = -(-self._used // self._LINE) * self._LINE
        if begin + size > len(self._piece):
            # Private: what could be shared with other processes gets no such pages.
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, max(size, self._PIECE), flags=kind)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._piece, begin = torch.frombuffer(memory, dtype=torch.uint8), 0
        self._used = begin + size
        return self._piece[begin : self._used]


class Library:
    """The functions.

    Raises:
        NativeUnavailable: the file cannot be loaded, or is another version's.
    """

    def __init__(self, file: Path) -> None:
        self._memory = _HugePages()
        try:
            # What was checked is what is loaded, whatever the name means by then. It stays
            # open: the loader goes by names, and must not see the same one for two libraries.
            self._fd = kept.open_checked(file)
            self._functions = functions = ctypes.CDLL(f"/proc/self/fd/{self._fd}")
        except (OSError, kept.Refused) as error:
            raise NativeUnavailable(
                f"the compiled kernels cannot be loaded: {error}"
            ) from error
        functions.veneer_instructions.restype = ctypes.c_char_p
        functions.veneer_packed_bytes.restype = c_int64
        functions.veneer_create.restype = c_void_p
        functions.veneer_step.restype = ctypes.c_char_p
        functions.veneer_step.argtypes = [c_void_p, ctypes.POINTER(Step)]
        functions.veneer_destroy.argtypes = [c_void_p]
        sizes = (c_int64 * len(_STRUCTS))()
        functions.veneer_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(struct) for struct in _STRUCTS]:
            raise NativeUnavailable("the compiled kernels expect other structs")

    @property
    def instructions(self) -> str:
        """``avx512-bf16`` or ``avx2``."""
        return str(self._functions.veneer_instructions().decode())

    def pack_four_bit(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Args:
        codes: [outputs, inputs / 2] uint8, the earlier of two neighbours in the high half.
        scales: [outputs, inputs / 64] float32.
        """
        outputs, inputs = codes.shape[0], 2 * codes.shape[1]
        packed = self._packed(FOUR_BIT, outputs, inputs)
        self._functions.veneer_pack_four_bit(
            c_void_p(address(codes)),
            c_void_p(address(scales)),
            outputs,
            inputs,
            c_void_p(address(packed)),
        )
        return packed

    def pack_dense(self, kind: int, weight: torch.Tensor) -> torch.Tensor:
        """Args:
        kind: `BFLOAT16`, or `EIGHT_BIT` in blocks of 64 with a scale each.
        weight: [outputs, inputs] bfloat16.
        """
        packed = self._packed(kind, *weight.shape)
        functions = self._functions
        pack = (
            functions.veneer_pack_bf16 if kind == BFLOAT16 else functions.veneer_pack_eight_bit
        )
        pack(c_void_p(address(weight)), *weight.shape, c_void_p(address(packed)))
        return packed

    def _packed(self, kind: int, outputs: int, inputs: int) -> torch.Tensor:
        size = int(self._functions.veneer_packed_bytes(kind, outputs, inputs))
        return self._memory.take(size)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in large pages."""
        size = math.prod(shape) * dtype.itemsize
        return self._memory.take(size).view(dtype).view(*shape)

    def multiply(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """x [rows, inputs] bfloat16 -> [rows, outputs] float32, on this thread."""
        y = torch.empty(len(x), linear.outputs)
        self._functions.veneer_multiply(
            ctypes.byref(linear), c_void_p(address(x)), c_int64(len(x)), c_void_p(address(y))
        )
        return y

    def create(self, model: Model, threads: int) -> int:
        """A decoder over ``model``, which the caller keeps alive."""
        engine = self._functions.veneer_create(ctypes.byref(model), threads)
        if not engine:
            raise NativeUnavailable(f"{threads} threads cannot be started")
        return int(engine)

    def step(self, engine: int, step: Step) -> None:
        """Execute it.

        Raises:
            MemoryError: there is none for its buffers.
        """
        failed = self._functions.veneer_step(engine, ctypes.byref(step))
        if failed is not None:
            raise MemoryError(failed.decode())

    def sample(self, engine: int | None, draws: ctypes.Array[Draw], vocab: int) -> None:
        """Fill in their tokens."""
        self._functions.veneer_sample(
            c_void_p(engine), draws, c_int64(len(draws)), c_int64(vocab)
        )

    def log_sums(
        self, engine: int | None, logits: int | None, shape: Sequence[int], to: int | None
    ) -> None:
        """log(sum of e^logit) of each row of [rows, vocab] float32."""
        rows, vocab = shape
        self._functions.veneer_log_sums(
            c_void_p(engine), c_void_p(logits), c_int64(rows), c_int64(vocab), c_void_p(to)
        )

    def destroy(self, engine: int) -> None:
        """End its threads."""
        self._functions.veneer_destroy(engine)


def pointer(array: NDArray[np.int64]) -> int:
    """Of a step's array; the caller keeps it alive."""
    assert array.flags.c_contiguous
    assert array.dtype == np.int64
    return int(array.ctypes.data)
