"""A strict reader of safetensors headers, and a writer of adapters' headers.

A file is an 8-byte little-endian length, a JSON object of that many bytes
(``name -> {dtype, shape, data_offsets}``), and the tensors' bytes. The reader
checks everything that the header claims against the size of the file before
it allocates anything of that size: safetensors 0.8.0 itself accepts
duplicate keys, a shape of [0, 2^60], and 100,000 empty tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO, Final, TypeGuard

from veneer_registry.strict_json import parse_object, refuse, show

_LENGTH_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: as written.
        dtype: safetensors' name, for example ``BF16``.
        shape: sizes of the dimensions.
        begin, end: offsets of its bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: the tensors fill the file without overlap or holes.

    Attributes:
        tensors: by name, in the order of their bytes.
        metadata: the strings of the file's ``__metadata__``.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Limits of what a header may claim.

    Attributes:
        header_bytes: most bytes of JSON.
        tensors: most tensors.
        bits: allowed dtypes, with their bits per element.
        dimensions: most dimensions of a tensor.
        smallest: smallest size of a dimension (1 refuses empty tensors).
        largest: largest size of a dimension.
    """

    header_bytes: int
    tensors: int
    bits: Mapping[str, int]
    dimensions: int
    smallest: int
    largest: int


ADAPTER_LIMITS: Final = HeaderLimits(
    header_bytes=2 << 20,
    tensors=16_384,
    bits=MappingProxyType({"F32": 32, "F16": 16, "BF16": 16}),
    dimensions=4,
    smallest=1,
    largest=1 << 28,
)
"""Limits for uploads. 126 layers with 7 projections have 1,764 tensors and a header of 0.3 MB;
parsing a much larger one would cost time and memory at an untrusted caller's will."""

CHECKPOINT_LIMITS: Final = HeaderLimits(
    header_bytes=100 << 20,
    tensors=1 << 20,
    bits=MappingProxyType(
        {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32}
        | {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
        | {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
    ),
    dimensions=8,
    smallest=0,
    largest=1 << 40,
)
"""Limits for base checkpoints, which the operator chooses: all dtypes, larger headers."""


def read_header(
    file: BinaryIO, name: str, limits: HeaderLimits = ADAPTER_LIMITS
) -> SafetensorsHeader:
    """Read and check the header of a file. Error messages call the file ``name``.

    Raises:
        AdapterInvalid: metadata ``file`` and, if one tensor is at fault, ``tensor``.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        refuse(name, f"has {size} bytes, too few for a safetensors file; save it again")
    length = int.from_bytes(prefix, "little")
    if length > limits.header_bytes:
        refuse(
            name,
            f"claims a header of {length} bytes, more than the {limits.header_bytes} "
            "allowed; it is not a safetensors file of an adapter",
        )
    if _LENGTH_BYTES + length > size:
        refuse(
            name,
            f"is cut off: its header of {length} bytes extends past the end of the file",
            cause="cut_off",
        )
    text = file.read(length)
    entries = parse_object(text, file=name)
    metadata = _metadata(name, entries.pop(_METADATA, {}))
    if len(entries) > limits.tensors:
        refuse(
            name,
            f"has {len(entries)} tensors, more than the {limits.tensors} allowed",
            cause="tensors",
        )
    start = _LENGTH_BYTES + length
    found = [_tensor(name, key, entry, start, limits) for key, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(name, found, start, size)
    return SafetensorsHeader(
        MappingProxyType({tensor.name: tensor for tensor in found}), MappingProxyType(metadata)
    )


def new_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the start of a file that has these tensors' bytes, one after the other in this
    order. Their offsets serve only to compute their sizes."""
    entries: dict[str, object] = {_METADATA: dict(metadata)}
    at = 0
    for tensor in tensors:
        end = at + tensor.end - tensor.begin
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)  # so that the tensors are aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _metadata(name: str, value: object) -> dict[str, str]:
    if value is None:  # as MLX writes it
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        refuse(name, "must map strings to strings", key=_METADATA)
    return value


def _sizes(value: object) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of sizes."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _tensor(
    file: str, name: str, entry: object, start: int, limits: HeaderLimits
) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        refuse(file, "must have exactly dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in limits.bits:
        allowed = ", ".join(limits.bits)
        refuse(file, f"has dtype {show(dtype)}; save it as one of {allowed}", tensor=name)
    if not _sizes(shape):
        refuse(file, f"has a shape that is not a list of sizes: {show(shape)}", tensor=name)
    if len(shape) > limits.dimensions:
        refuse(file, f"has {len(shape)} dimensions; at most {limits.dimensions}", tensor=name)
    if shape and not (limits.smallest <= min(shape) and max(shape) <= limits.largest):
        refuse(
            file,
            f"has shape {show(shape)}; each size must be {limits.smallest} to {limits.largest}",
            tensor=name,
        )
    if not _sizes(offsets) or len(offsets) != 2:
        refuse(file, f"has data_offsets {show(offsets)}; need [begin, end]", tensor=name)
    begin, end = offsets
    bits = limits.bits[dtype] * math.prod(shape)
    if bits % 8 or end - begin != bits // 8:
        refuse(
            file,
            f"spans {end - begin} bytes, but {dtype} of shape {show(shape)} "
            f"takes {bits // 8}; save the file again",
            tensor=name,
        )
    return TensorInfo(name, dtype, tuple(shape), start + begin, start + end)


def _check_layout(file: str, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Check that the tensors, in byte order, fill the file from the header to its end."""
    at = start
    for tensor in tensors:
        if tensor.begin != at:
            kind = (
                "overlaps the tensor before it"
                if tensor.begin < at
                else "leaves a hole before it"
            )
            refuse(file, f"{kind}; save the file again", tensor=tensor.name)
        at = tensor.end
    if at != size:
        cut = at > size
        what = "is cut off" if cut else "has bytes that belong to no tensor"
        refuse(
            file,
            f"{what}: tensors end at {at}, the file at {size}; copy it again",
            cause="cut_off" if cut else "unowned_bytes",
        )
