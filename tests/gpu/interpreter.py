"""Triton's interpreter, set up for tests. Import this before anything that imports triton.

Whether a kernel is interpreted is decided when it is defined, those of triton's own library
included, so one process either interprets or compiles.

What is changed in the interpreter (triton 3.9):

- Programs run in a random order (`order`).
- A launch in which two programs write the same element, or one reads what another writes, is
  an error (`Race`): on a card their order is anyone's.
- An access outside the buffers of `allow` is an error (`OutOfBounds`) before it happens. Lanes
  that a mask turns off do not count.
- bfloat16 is rounded to nearest even, as the card does. The interpreter truncates, and
  multiplies the bits of bfloat16 matrices as if they were integers. Arithmetic on bfloat16
  other than `tl.dot` is an error: kernels convert to float32 first.
- Masked loads without ``other`` give NaN (or a large integer) where the mask is False. On a
card
  the value is undefined; the interpreter gives 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np

assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
    "triton was imported before tests.gpu.interpreter"
)
os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402 (the variable is read at import)
from triton.runtime import interpreter  # noqa: E402

_BUILDER: Any = interpreter.interpreter_builder
_CLASS: Any = type(_BUILDER)


@contextmanager
def order(random: Random | None) -> Iterator[None]:
    """Until the context exits, launches run their programs in an order drawn from ``random``,
    or in the grid's own order if None."""
    _Grid.random = random
    try:
        yield
    finally:
        _Grid.random = None


class Race(AssertionError):
    """A launch whose result depends on the order of its programs."""


class OutOfBounds(AssertionError):
    """A program that reads or writes where no buffer is."""


class _Memory:
    starts = np.empty(0, np.uint64)
    ends = np.empty(0, np.uint64)


def allow(ranges: list[tuple[int, int]]) -> None:
    """From now on programs may access these addresses only: first, one past the last."""
    ranges = sorted(r for r in ranges if r[0] < r[1])
    _Memory.starts = np.array([start for start, _ in ranges], np.uint64)
    _Memory.ends = np.array([end for _, end in ranges], np.uint64)


class _Accesses:
    """Addresses that the programs of the launch in progress read and wrote."""

    program = 0
    reads: list[tuple[int, np.ndarray[Any, Any]]] = []  # noqa: RUF012 (of the class: one launch)
    writes: list[tuple[int, np.ndarray[Any, Any]]] = []  # noqa: RUF012

    @classmethod
    def check(cls) -> None:
        """Raises Race."""
        places = np.concatenate([np.empty(0, np.uint64), *(where for _, where in cls.writes)])
        if not len(places):
            return
        owners = np.repeat([p for p, _ in cls.writes], [len(w) for _, w in cls.writes])
        order = np.argsort(places, kind="stable")
        places, owners = places[order], owners[order]
        if ((places[1:] == places[:-1]) & (owners[1:] != owners[:-1])).any():
            raise Race("two programs write the same element")
        for program, where in cls.reads:
            at = np.searchsorted(places, where).clip(max=len(places) - 1)
            if ((places[at] == where) & (owners[at] != program)).any():
                raise Race("a program reads what another writes")


def _noted(pointers: Any, mask: Any) -> np.ndarray[Any, Any]:
    where = np.asarray(pointers.data)
    where = where[np.broadcast_to(mask.data, where.shape)].ravel()
    at = np.searchsorted(_Memory.starts, where, side="right").astype(np.int64) - 1
    if len(where) and (at.min() < 0 or (where >= _Memory.ends[at]).any()):
        raise OutOfBounds("a program accesses what is no buffer")
    return where


class _Grid:
    random: Random | None = None
    shuffled: tuple[tuple[int, int, int], ...] = ()
    size = (1, 1, 1)


def _set_dim(self: Any, nx: int, ny: int, nz: int) -> None:
    _GRID_DIM(self, nx, ny, nz)
    _Grid.size = (nx, ny, nz)
    places = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
    if _Grid.random is not None:
        _Grid.random.shuffle(places)
    _Grid.shuffled = tuple(places)


def _set_index(self: Any, x: int, y: int, z: int) -> None:
    _, ny, nz = _Grid.size
    _Accesses.program += 1
    _GRID_INDEX(self, *_Grid.shuffled[(x * ny + y) * nz + z])


def to_bfloat16(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits, uint16, of float32 numbers rounded to nearest even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(numbers)
    return np.where(nan, (bits >> 16).astype(np.uint16) | 0x40, rounded)


def from_bfloat16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 numbers."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before == after:
        return source
    if before == tl.bfloat16:
        numbers = from_bfloat16(source.data)
        if after == tl.float32:
            return interpreter.TensorHandle(numbers, after)
        return _CAST(self, interpreter.TensorHandle(numbers, tl.float32), target)
    if after == tl.bfloat16:
        return interpreter.TensorHandle(to_bfloat16(source.data.astype(np.float32)), after)
    return _CAST(self, source, target)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a = interpreter.TensorHandle(from_bfloat16(a.data), tl.float32)
        b = interpreter.TensorHandle(from_bfloat16(b.data), tl.float32)
    if a.dtype.scalar != tl.float32 or d.dtype.scalar != tl.float32:
        return _DOT(self, a, b, d, *rest)
    # With OpenBLAS's kernels for AVX2 the order of a sum depends on the matrix's shape, unlike
    # a card's. In float64 sums of such products are the same in any order.
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return interpreter.TensorHandle(product.astype(np.float32) + d.data, tl.float32)


def _binary(self: Any, left: Any, right: Any, op: Any) -> Any:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise TypeError("arithmetic on bfloat16: convert to float32 first")
    return _BINARY(self, left, right, op)


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
    _Accesses.reads.append((_Accesses.program, _noted(pointers, mask)))
    if other is None:
        element = pointers.get_element_ty()
        numpy = interpreter._get_np_dtype(element)  # private: the interpreter's own table
        if element == tl.bfloat16:
            filled = np.full(pointers.data.shape, 0x7FC0, numpy)
        elif element.is_floating():
            filled = np.full(pointers.data.shape, np.nan, numpy)
        else:
            filled = np.full(pointers.data.shape, np.iinfo(numpy).max // 3, numpy)
        other = interpreter.TensorHandle(filled, element)
    return _MASKED_LOAD(self, pointers, mask, other, *rest)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _Accesses.writes.append((_Accesses.program, _noted(pointers, mask)))
    return _MASKED_STORE(self, pointers, value, mask, *rest)


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    _Accesses.reads, _Accesses.writes = [], []
    try:
        _LAUNCH(self, *args, **kwargs)
    except interpreter.InterpreterError as error:
        if isinstance(error.__cause__, AssertionError):
            raise error.__cause__ from None
        raise
    _Accesses.check()


_GRID_DIM, _CLASS.set_grid_dim = _CLASS.set_grid_dim, _set_dim
_GRID_INDEX, _CLASS.set_grid_idx = _CLASS.set_grid_idx, _set_index
_CAST, _CLASS.cast_impl = _CLASS.cast_impl, _cast
_CLASS.create_fp_to_fp = lambda self, source, target, rounding: _cast(self, source, target)
_DOT, _CLASS.create_dot = _CLASS.create_dot, _dot
_BINARY, _CLASS.binary_op = _CLASS.binary_op, _binary
_MASKED_LOAD, _CLASS.create_masked_load = _CLASS.create_masked_load, _masked_load
_MASKED_STORE, _CLASS.create_masked_store = _CLASS.create_masked_store, _masked_store
_LAUNCH = interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = _launch  # type: ignore[method-assign]
