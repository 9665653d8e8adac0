"""Reads the header of a GGUF file: its metadata and its list of tensors.

For adapters (`converting`) and bases (the server's ``models.gguf_base``). Files are untrusted,
so this does not use the package ``gguf``, which loops as often as a file says. Everything is
checked against bounds and the file's size before it is used.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn

from veneer_registry.adapter import Projection
from veneer_registry.strict_json import refuse, show

BLOCK_TYPES: Final[Mapping[str, tuple[int, int]]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
}
"""Quantized types that bases may have -> (numbers, bytes) of a block."""
PLAIN_TYPES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
"""Types without blocks -> bytes of a number."""
PROJECTION_TENSORS: Final[Mapping[Projection, str]] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""The part of a tensor's name (``blk.LAYER.PART.weight``) for each projection."""
INTERLEAVED: Final[Mapping[str, bool]] = {"llama": True, "qwen2": False, "qwen3": False}
"""Architecture -> whether llama.cpp interleaves the rows of q and k, see `gguf_adapter`."""

_TYPE_NAMES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_MAGIC: Final = b"GGUF"
_MOST_TENSORS: Final = 16_384
_MOST_FACTS: Final = 4096
_MOST_DEPTH: Final = 2
_ALIGNMENT: Final = "general.alignment"
_NUMBERS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Metadata type -> `struct` format, for all types except strings (8) and arrays (9)."""


@dataclass(frozen=True, slots=True)
class GgufBounds:
    """Bounds of a header.

    Attributes:
        bytes: most bytes of the header.
        items: most items of all arrays together; 0: arrays are skipped, and only their lengths
            are returned, as of an array inside an array.
    """

    bytes: int
    items: int


ADAPTER_BOUNDS: Final = GgufBounds(bytes=16 << 20, items=0)
BASE_BOUNDS: Final = GgufBounds(bytes=64 << 20, items=4 << 20)
"""Of a whole model, whose header has the tokenizer. Gemma's 256,000 tokens take 11 MB."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        kind: name of its type, such as ``Q4_K``; ``type N`` if it is unknown.
        shape: as in numpy and torch: columns last.
        begin: offset in the file.
        size: bytes; 0 if the type is neither in `BLOCK_TYPES` nor in `PLAIN_TYPES`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key, and the tensors in the file's order."""

    facts: Mapping[str, Any]
    tensors: Sequence[GgufTensor]


def read_gguf_header(file: BinaryIO, name: str, bounds: GgufBounds) -> GgufHeader:
    """Read a file's header. Tensors of readable types lie within the file.

    Args:
        name: the file's name, for messages.

    Raises:
        AdapterInvalid: it is no GGUF file, or cut off, or claims what cannot be.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    cursor = _Cursor(file.read(min(size, bounds.bytes)), name, bounds)
    if size < len(_MAGIC) or cursor.take(4) != _MAGIC:
        cursor.bad("is not a GGUF file; give one that llama.cpp's tools wrote", cause="magic")
    version = cursor.number("I")
    if version not in (2, 3):
        cursor.bad(f"is GGUF version {version}; 2 and 3 are read, of little-endian machines")
    count, facts_count = cursor.number("Q"), cursor.number("Q")
    if count > _MOST_TENSORS or facts_count > _MOST_FACTS:
        cursor.bad(
            f"claims {count} tensors and {facts_count} facts; at most {_MOST_TENSORS} and "
            f"{_MOST_FACTS} are allowed: convert it again",
            cause="header",
        )
    facts: dict[str, Any] = {}
    for _ in range(facts_count):
        key = cursor.text()
        facts[key] = cursor.value(cursor.number("I"))
    listed = [cursor.tensor() for _ in range(count)]
    alignment = facts.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
        cursor.bad(f"is {show(alignment)}; need a small number", key=_ALIGNMENT)
    start = cursor.at + -cursor.at % alignment
    found = tuple(dataclasses.replace(each, begin=start + each.begin) for each in listed)
    for each in found:
        if each.begin + each.size > size:
            cursor.bad("extends past the end of the file; copy it again", tensor=each.name)
    return GgufHeader(facts, found)


class _Cursor:
    """Reads values from the bytes of a header, and never past their end."""

    def __init__(self, data: bytes, name: str, bounds: GgufBounds) -> None:
        self._data, self._name, self._bounds, self.at = data, name, bounds, 0
        self._items = bounds.items

    def bad(self, why: str, **more: Any) -> NoReturn:
        refuse(self._name, why, **more)

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            self.bad(
                f"has a header that is cut off, or larger than {self._bounds.bytes >> 20} MiB; "
                "copy it again",
                cause="header",
            )
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        (found,) = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))
        return found

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a metadata value: a number, a text, or a list; see `GgufBounds.items`."""
        if kind == 8:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != 9 or depth == _MOST_DEPTH:
            self.bad(f"has metadata of the unknown type {kind}", cause="header")
        inner, count = self.number("I"), self.number("Q")
        kept = self._bounds.items > 0 == depth
        if kept:
            self._items -= count
            if self._items < 0:
                self.bad(
                    f"has arrays of more than {self._bounds.items} items; it is not a model "
                    "that can be served",
                    cause="header",
                )
        if inner in _NUMBERS:
            data = self.take(count * struct.calcsize(_NUMBERS[inner]))
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", data)) if kept else count
        found = []
        for _ in range(count):  # each takes some bytes, or is refused
            item = self.value(inner, depth + 1)
            if kept:
                found.append(item)
        return found if kept else count

    def tensor(self) -> GgufTensor:
        """Read an entry of the list of tensors; `begin` counts from the first tensor."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= 4:
            self.bad(f"has {dimensions} dimensions; need 1 to 4", tensor=name)
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, begin = self.number("I"), self.number("Q")
        kind = _TYPE_NAMES.get(number, f"type {number}")
        numbers = math.prod(shape)
        if kind in PLAIN_TYPES:
            return GgufTensor(name, kind, shape, begin, numbers * PLAIN_TYPES[kind])
        if kind not in BLOCK_TYPES:
            return GgufTensor(name, kind, shape, begin, 0)
        block, size = BLOCK_TYPES[kind]
        if shape[-1] % block:
            self.bad(
                f"has rows of {shape[-1]} numbers, which {kind} cannot have; convert it again",
                tensor=name,
            )
        return GgufTensor(name, kind, shape, begin, numbers // block * size)
