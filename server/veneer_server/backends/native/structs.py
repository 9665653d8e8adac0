"""The structs of the C interface (``step.h``, ``linear.h``, ``lora.h`` and ``sample.h`` under
``cpp``), and a check that a compiled library has the same ones."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import (
    c_char_p,
    c_double,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_uint16,
    c_uint64,
    c_void_p,
)
from typing import Any, ClassVar, Final

_Fields = Sequence[tuple[str, Any]]


class Linear(ctypes.Structure):
    """A packed weight; see ``cpp/kernels/gemm/linear.h``."""

    _fields_: ClassVar[_Fields] = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("kind", c_int32),
        ("parts", c_int32),
        ("int8_inputs", c_int32),
        ("unit", c_float),
        ("table", c_uint16 * 16),
        ("bytes", c_int8 * 16),
    ]


class Layer(ctypes.Structure):
    """A layer's weights and its part of the KV cache."""

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
    """An adapter's matrices for one group of one layer."""

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
    """Adjacent rows that share an adapter."""

    _fields_: ClassVar[_Fields] = [
        ("begin", c_int64),
        ("end", c_int64),
        ("adapter", ctypes.POINTER(LoraAdapter)),
    ]


class Step(ctypes.Structure):
    """`StepArrays`, and where to write the results."""

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


class SampleRow(ctypes.Structure):
    """A row of logits, and how its token is sampled."""

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


STRUCTS: Final[tuple[type[ctypes.Structure], ...]] = (
    Linear,
    Layer,
    Model,
    LoraMember,
    LoraGroup,
    LoraAdapter,
    Segment,
    Step,
    SampleRow,
)


class Field(ctypes.Structure):
    """A row of the layout tables (see ``cpp/layout.h``): a field or, without a name, the
    struct itself."""

    _fields_: ClassVar[_Fields] = [
        ("struct", c_char_p),
        ("name", c_char_p),
        ("offset", c_int64),
        ("size", c_int64),
    ]


def mismatch(table: Any) -> str | None:
    """Describe the first difference between Python's structs and a library's, or return None.

    Args:
        table: array of `Field`, ended by a row without a struct.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for row in itertools.takewhile(
        lambda row: row.struct, map(table.__getitem__, itertools.count())
    ):
        rows.setdefault(row.struct.decode(), {})[row.name.decode()] = (row.offset, row.size)
    for struct in STRUCTS:
        theirs = rows.pop(struct.__name__, {})
        ours = {"": (0, ctypes.sizeof(struct))}
        for name, *_ in struct._fields_:
            place = getattr(struct, name)
            ours[name] = (place.offset, place.size)
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                return (
                    f"struct {struct.__name__}: {_words(name, ours.get(name))} in Python, "
                    f"{_words(name, theirs.get(name))} in the library"
                )
    return f"struct {min(rows)}: Python has none" if rows else None


def _words(name: str, place: tuple[int, int] | None) -> str:
    if place is None:
        return f"no field {name}" if name else "no such struct"
    offset, size = place
    return f"{name} of {size} bytes at {offset}" if name else f"{size} bytes"
