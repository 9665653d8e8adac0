"""The table of contents of a packed base: the offset of each part in one run of bytes.

Offsets are multiples of a cache line. These records are written into the file as JSON.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
import torch

LINE: Final = 64

DTYPES: Final[dict[str, torch.dtype]] = {"BF16": torch.bfloat16, "F32": torch.float32}


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class TensorPart(_Record, frozen=True):
    """An unpacked tensor."""

    offset: int
    dtype: Literal["BF16", "F32"]
    shape: tuple[int, ...]


class LinearPart(_Record, frozen=True):
    """A packed weight, and its bias; see `library.Linear`.

    Attributes:
        table: the numbers of 4-bit codes, as bits of bfloat16; empty for other kinds.
    """

    offset: int
    bytes: int
    kind: int
    outputs: int
    inputs: int
    parts: int
    table: tuple[int, ...]
    bias: TensorPart | None


class LayerParts(_Record, frozen=True):
    """The parts of a layer, as in `models.loader.LayerWeights`."""

    input_norm: TensorPart
    post_norm: TensorPart
    query_norm: TensorPart | None
    key_norm: TensorPart | None
    qkv: LinearPart
    output: LinearPart
    gate_up: LinearPart
    down: LinearPart


class Contents(_Record, frozen=True):
    """The parts of a whole base. The output head is packed in 8 bits.

    Attributes:
        size: bytes of the run.
    """

    size: int
    parameters: int
    layers: tuple[LayerParts, ...]
    embedding: TensorPart
    final_norm: TensorPart
    inv_freq: TensorPart
    rotary_scale: float
    head: LinearPart
