"""Reads a base's tensors one at a time, into memory that every read reuses.

Files are read, not mapped: mapped pages would count towards the process's memory until the
system takes them back, so a first start would seem to need memory for the whole checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import torch
from veneer_registry.adapter import Projection
from veneer_registry.errors import AdapterInvalid
from veneer_registry.fingerprint import weight_files
from veneer_registry.gguf_header import BLOCK_TYPES
from veneer_registry.safetensors_header import CHECKPOINT_LIMITS, TensorInfo, read_header

from veneer_server.models.checkpoint import ggml
from veneer_server.models.checkpoint.int_codes import SUFFIXES, DamagedCodes, read_linear
from veneer_server.models.checkpoint.rotary import rotary
from veneer_server.models.config import DecoderConfig, UnsupportedModel, read_decoder_config
from veneer_server.models.gguf_base import ROPE_FREQS, read_gguf
from veneer_server.models.quantized import QuantizedMatrix
from veneer_server.models.source import BaseDamaged

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_PIECE: Final = 64 << 20
"""Bytes per read."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """The names of a linear's weight and bias in the files.

    Attributes:
        name: name of the weight.
        shape: (outputs, inputs).
        bias: name of the bias; empty if there is none.
        state: names of the tensors that belong to a weight stored in 4 bits, by bitsandbytes'
            names for them.
    """

    name: str
    shape: tuple[int, int]
    bias: str
    state: Mapping[str, str]


class Checkpoint:
    """A base's checkpoint. A context manager that keeps the files open.

    Attributes:
        body: prefix of the names of the decoder's tensors.

    Raises:
        InvalidField: the folder holds no readable weights.
        UnsupportedModel: the decoder cannot run the model.
        BaseDamaged: the header of a file is not valid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: DecoderConfig = read_decoder_config(folder)
        self._files = ExitStack()
        self._of: dict[str, tuple[int, TensorInfo]] = {}
        self._heads: dict[str, int] = {}
        """Tensors with interleaved rows, see `models.gguf_base`, and their numbers of heads."""
        self._scratch = torch.empty(0, dtype=torch.uint8)
        try:
            for path in weight_files(folder):
                file = self._files.enter_context(path.open("rb"))
                if self.config.quantization == "gguf":
                    self._list_gguf(file, path.name)
                    continue
                try:
                    tensors = read_header(file, path.name, CHECKPOINT_LIMITS).tensors
                except AdapterInvalid as error:
                    raise _damaged(folder, str(error)) from error
                self._of |= {name: (file.fileno(), info) for name, info in tensors.items()}
        except BaseException:
            self._files.close()
            raise
        # A checkpoint without a head has no such prefix.
        self.body = "model." if any(name.startswith("model.") for name in self._of) else ""

    def _list_gguf(self, file: BinaryIO, name: str) -> None:
        """List a GGUF file's tensors by Hugging Face's names."""
        base = read_gguf(file, name)
        listed = [(ours, each.stored) for ours, each in base.tensors.items()]
        if base.rope_freqs is not None:
            listed.append((ROPE_FREQS, base.rope_freqs))
        for ours, tensor in listed:
            end = tensor.begin + tensor.size
            info = TensorInfo(ours, tensor.kind, tensor.shape, tensor.begin, end)
            self._of[ours] = (file.fileno(), info)
        self._heads = {ours: each.heads for ours, each in base.tensors.items() if each.heads}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    @property
    def parameters(self) -> int:
        """Number of the base's parameters; 4-bit weights count unpacked."""
        config, layers = self.config, range(self.config.num_layers)
        norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
        embedding = config.vocab_size * config.hidden_size
        matrices = [self.matrix(layer, name) for layer in layers for name in config.shapes]
        return (
            embedding * (1 if config.tied_head else 2)
            + sum(math.prod(each.shape) for each in matrices)
            + sum(each.shape[0] for each in matrices if each.bias)
            + config.num_layers * norms
            + config.hidden_size
        )

    def matrix(self, layer: int, projection: Projection) -> Matrix:
        """Return the names of a layer's linear."""
        block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        stem = f"{self.body}layers.{layer}.{block}.{projection}"
        name, bias = f"{stem}.weight", f"{stem}.bias"
        return Matrix(
            name=name,
            shape=self.config.shapes[projection],
            bias=bias if bias in self._of else "",
            state=self.state(name),
        )

    def state(self, name: str) -> Mapping[str, str]:
        """Return the names of the tensors that belong to a 4-bit weight; empty for others."""
        if self.config.quantization is None:
            return {}
        begin = f"{name}."
        return {key[len(begin) :]: key for key in self._of if key.startswith(begin)}

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read a tensor in the dtype of its file; it is valid until the next read.

        Args:
            shape: the shape that it must have; None for any.

        Raises:
            BaseDamaged: the tensor is missing, cut off or of another shape.
            UnsupportedModel: its dtype is not supported for weights.
        """
        if name not in self._of:
            raise _damaged(self.folder, f"it has no tensor {name}")
        info = self._of[name][1]
        if shape is not None and info.shape != shape:
            raise _damaged(
                self.folder, f"{name} is {list(info.shape)}, its config says {list(shape)}"
            )
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"{name} has dtype {info.dtype}; supported are {', '.join(_DTYPES)}",
                metadata={"key": name, "supported": " ".join(_DTYPES)},
            )
        found = self._bytes(name).view(dtype).view(info.shape)
        heads = self._heads.get(name)
        return found if heads is None else found[_separated(len(found), heads)]

    def _bytes(self, name: str) -> torch.Tensor:
        """Read a tensor's bytes, uint8; they are valid until the next read."""
        file, info = self._of[name]
        size = info.end - info.begin
        if len(self._scratch) < size:
            self._scratch = torch.empty(0, dtype=torch.uint8)  # free it first
            self._scratch = torch.empty(size, dtype=torch.uint8)
        found = self._scratch[:size]
        buffer, done = found.numpy().data, 0
        while done < size:
            piece = buffer[done : done + _PIECE]
            count = os.preadv(file, [piece], info.begin + done)
            if not count:
                raise _damaged(self.folder, f"{name} is cut off")
            done += count
        return found

    def has(self, name: str) -> bool:
        """Whether the files have a tensor of this name."""
        return name in self._of

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedMatrix | None:
        """Read a weight that is stored as codes, in its own memory; None if it is not.

        Args:
            name: the weight's name in an unquantized folder, ``STEM.weight``.
            shape: the shape that it must have.

        Raises:
            BaseDamaged: its tensors do not fit together.
        """
        stored = self.config.stored
        if stored is None or not stored.is_codes:
            return None
        if stored.format == "gguf":
            info = self._of[name][1] if name in self._of else None
            if info is None or info.dtype not in BLOCK_TYPES:
                return None
            if info.shape != shape:
                raise _damaged(
                    self.folder, f"{name} is {list(info.shape)}, its config says {list(shape)}"
                )
            made = ggml.read_matrix(info.dtype, self._bytes(name), shape)
            heads = self._heads.get(name)
            found = made if heads is None else made[_separated(shape[0], heads)]
        else:
            stem = name.removesuffix(".weight")
            if f"{stem}.{SUFFIXES[stored.format]}" not in self._of:
                return None
            try:
                found = read_linear(
                    stored, lambda suffix: self._copy(f"{stem}.{suffix}"), shape
                )
            except DamagedCodes as error:
                raise _damaged(self.folder, f"{stem}: {error}") from error
        for factors in (found.scales, found.mins):
            if factors is not None and not bool(factors.outer.isfinite().all()):
                raise _damaged(self.folder, f"{name} has a scale that is no finite number")
        return found

    def _copy(self, name: str) -> torch.Tensor | None:
        return self.read(name).clone() if name in self._of else None

    def rotary(self) -> tuple[torch.Tensor, float]:
        """Return the rotary frequencies, [head_dim / 2] float32, and the factor on cos and sin.
        They follow from the config, and in a GGUF file from factors in it."""
        found, scale = rotary(self.folder)
        if ROPE_FREQS in self._of:
            found = found / self.read(ROPE_FREQS, tuple(found.shape))
        return found, scale

    def rounded(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read a tensor and return a copy in bfloat16; see `read`."""
        return self.read(name, shape).to(torch.bfloat16, copy=True)


def _separated(rows: int, heads: int) -> torch.Tensor:
    """Return the place in llama.cpp's order of each row in Hugging Face's: [rows] int64. There,
    row i of a head's first half is followed by row i of its second half."""
    places = torch.arange(rows).view(heads, -1, 2)
    return places.transpose(1, 2).reshape(-1)


def _damaged(folder: Path, why: str) -> BaseDamaged:
    return BaseDamaged(
        f"the base in {folder} is damaged: {why}. Download it again",
        metadata={"cause": "unreadable"},
    )
