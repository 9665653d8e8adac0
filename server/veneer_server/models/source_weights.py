"""The base's weights from its own files, for a reference that must trust neither the cache of
4-bit weights nor the weights in memory.

They are read one layer at a time and quantized again: no cached file, packed weight or kernel
is involved. Only libraries are shared with the loader: bitsandbytes, since nothing else gives
exactly the codes that are served (a different rounding of the 0.1 % of weights that lie between
two codes would exceed the error bound of float32), and transformers' formulas for rotary
frequencies. Weights that are stored as codes (`models.quantized`) are read again by the reader
that the loader has, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from veneer_registry.fingerprint import weight_files

from veneer_server.models.checkpoint import e4m3
from veneer_server.models.checkpoint.reader import Checkpoint
from veneer_server.models.checkpoint.rotary import rotary
from veneer_server.models.config import Quantization, read_decoder_config
from veneer_server.models.linear import Dense, Expanded, QuantizedLinear
from veneer_server.models.packed import row_slices, rows_of
from veneer_server.models.quantized import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class SourceLinear:
    """Linears side by side, in float32; see `models.linear.ServedLinear.expanded`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def expanded(self) -> Iterator[Expanded]:
        """Yield the rows in order."""
        for rows in row_slices(*self.weight.shape):
            yield self.weight[rows], rows_of(self.bias, rows)


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """One layer, with the fields of `models.loader.LayerWeights`."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: SourceLinear
    output: SourceLinear
    gate_up: SourceLinear
    down: SourceLinear


class SourceWeights:
    """Reads the base's weights. A context manager that keeps the files open. Tensors are on the
    CPU.

    Args:
        folder: the base's own folder, not one in a cache.
        quantization, dtype: quantization and dtype in which the base is served.

    Raises:
        InvalidField: the folder holds no readable weights.
    """

    device: Final = torch.device("cpu")

    def __init__(self, folder: Path, quantization: Quantization, dtype: torch.dtype) -> None:
        self.config = read_decoder_config(folder)
        self._dtype = dtype
        self._quantization = quantization
        self._files = ExitStack()
        self._of: dict[str, Any] = {}
        self._codes: Checkpoint | None = None
        try:
            self._open(folder)
        except BaseException:
            self._files.close()
            raise

    def _open(self, folder: Path) -> None:
        from safetensors import safe_open

        stored = self.config.stored
        if stored is not None and stored.is_codes:
            self._codes = self._files.enter_context(Checkpoint(folder))
        else:
            for file in weight_files(folder):
                opened = self._files.enter_context(safe_open(file, framework="pt"))
                self._of |= dict.fromkeys(opened.keys(), opened)
        # A checkpoint without a head has no such prefix.
        named = any(name.startswith("model.") for name in self._of)
        self._body = self._codes.body if self._codes else "model." if named else ""
        self.final_norm = self._tensor(f"{self._body}norm.weight").float()
        self.inv_freq, self.rotary_scale = (
            rotary(folder) if self._codes is None else self._codes.rotary()
        )

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `models.loader.DecoderWeights.embedded`."""
        name = f"{self._body}embed_tokens.weight"
        codes = self._in_codes(name)
        return (
            self._tensor(name)[tokens].float() if codes is None else codes[tokens].dequantize()
        )

    def head_rows(self) -> Iterator[Expanded]:
        """See `models.loader.DecoderWeights.head_rows`."""
        tied = self.config.tied_head
        name = f"{self._body}embed_tokens.weight" if tied else "lm_head.weight"
        codes = self._in_codes(name)
        if codes is None:
            return Dense(self._tensor(name), None).expanded()
        return QuantizedLinear(codes).expanded()

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
    def layers(self) -> Iterator[SourceLayer]:
        """Yield the layers, reading one after the other and keeping none."""
        for index in range(self.config.num_layers):
            stem = f"{self._body}layers.{index}"
            attention, mlp = f"{stem}.self_attn", f"{stem}.mlp"
            normed = self.config.qk_norm
            yield SourceLayer(
                input_norm=self._tensor(f"{stem}.input_layernorm.weight").float(),
                post_norm=self._tensor(f"{stem}.post_attention_layernorm.weight").float(),
                query_norm=self._tensor(f"{attention}.q_norm.weight").float()
                if normed
                else None,
                key_norm=self._tensor(f"{attention}.k_norm.weight").float() if normed else None,
                qkv=self._linear([f"{attention}.{name}_proj" for name in "qkv"]),
                output=self._linear([f"{attention}.o_proj"]),
                gate_up=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
                down=self._linear([f"{mlp}.down_proj"]),
            )

    def _has(self, name: str) -> bool:
        return name in self._of if self._codes is None else self._codes.has(name)

    def _tensor(self, name: str) -> torch.Tensor:
        if self._codes is not None:
            return self._codes.read(name).to(self._dtype, copy=True)
        found: torch.Tensor = self._of[name].get_tensor(name)
        return found.to(self._dtype)

    def _in_codes(self, name: str) -> QuantizedMatrix | None:
        """Read a matrix that is stored in codes; None if it is not."""
        config = self.config
        if self._codes is None:
            return None
        shape = (config.vocab_size, config.hidden_size)
        for projection, each in config.shapes.items():
            if name.endswith(f".{projection}.weight"):
                shape = each
        return self._codes.quantized(name, shape)

    def _linear(self, names: Sequence[str]) -> SourceLinear:
        weights = [self._weight(f"{name}.weight") for name in names]
        biases = [
            self._tensor(f"{name}.bias").float()
            if self._has(f"{name}.bias")
            else torch.zeros(len(weight))
            for name, weight in zip(names, weights, strict=True)
        ]
        some = any(self._has(f"{name}.bias") for name in names)
        return SourceLinear(torch.cat(weights), torch.cat(biases) if some else None)

    def _weight(self, name: str) -> torch.Tensor:
        """Return a weight as it is served, except for rounding: [outputs, inputs] float32."""
        codes = self._in_codes(name)
        if codes is not None:
            return codes.dequantize()
        state = {key: self._of[key] for key in self._of if key.startswith(f"{name}.")}
        if state:
            return _stored(
                self._of[name].get_tensor(name),
                {key: opened.get_tensor(key) for key, opened in state.items()},
            )
        weight = self._tensor(name)
        stored = self.config.quantization is not None
        if stored or self._quantization == "none":
            return weight.float()
        if self._quantization == "fp8":
            numbers, scales = e4m3.quantize(weight)
            return numbers.float() * scales.unsqueeze(1)
        return _quantized(weight, self._quantization)


def _stored(codes: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a weight that is stored in 4 bits, in float32."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    made = QuantState.from_dict(state, device=torch.device("cpu"))
    weight: torch.Tensor = dequantize_4bit(codes, made)
    return weight.float()


def _quantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight after 4-bit double quantization and back; takes 30 ns per element."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, compress_statistics=True, quant_type=kind)
    left: torch.Tensor = dequantize_4bit(codes, state)
    return left.float()
