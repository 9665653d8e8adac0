"""Loads a base model through transformers and bitsandbytes into decoder weights, for torch.

The native backend needs neither: see `backends.native.packed.base`.

transformers knows every checkpoint layout and rotary scaling, bitsandbytes the
4-bit formats; this module only takes their modules apart. 4-bit weights are
cached as an ordinary prequantized folder (`models.quantized_cache`), so that a restart takes
seconds. Files are hashed while they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from veneer_registry.adapter import Projection
from veneer_registry.errors import VeneerError
from veneer_registry.fingerprint import weights_fingerprint

from veneer_server.models.checkpoint.reader import Checkpoint
from veneer_server.models.config import (
    DecoderConfig,
    Quantization,
    UnsupportedModel,
    read_decoder_config,
)
from veneer_server.models.linear import (
    Dense,
    Expanded,
    QuantizedLinear,
    ServedLinear,
    SideBySide,
    fuse,
)
from veneer_server.models.quantized import QuantizedMatrix, stacked
from veneer_server.models.quantized_cache import QuantizedCache
from veneer_server.models.source import BaseDamaged
from veneer_server.progress import Stage, stage

Fuse = Callable[[Sequence[nn.Module], torch.dtype], ServedLinear]
"""Makes one linear from modules that share an input; see `models.linear.fuse`."""

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype named ``bfloat16``, ``float16`` or ``float32``."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32 [hidden] (or [head_dim])."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: ServedLinear
    output: ServedLinear
    gate_up: ServedLinear
    down: ServedLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The frozen base, ready for the decoder.

    Attributes:
        dense_embedding: [vocab, hidden]; None if it is in codes.
        dense_head: [vocab, hidden]; the same storage as the embedding if tied. None if it is in
            codes, or only the backend holds the head, in its own format.
        inv_freq: [head_dim / 2] float32, rotary frequencies after scaling.
        rotary_scale: factor on cos and sin (YaRN), otherwise 1.
        parameters: number of the base model's parameters.
        nbytes: bytes of all resident weights.
        coded_embedding, coded_head: [vocab, hidden]; None if not stored in codes.
    """

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device
    dense_embedding: torch.Tensor | None
    dense_head: torch.Tensor | None
    final_norm: torch.Tensor
    layers: tuple[LayerWeights, ...]
    inv_freq: torch.Tensor
    rotary_scale: float
    parameters: int
    nbytes: int
    coded_embedding: QuantizedMatrix | None = None
    coded_head: QuantizedLinear | None = None

    @property
    def embedding(self) -> torch.Tensor:
        """`dense_embedding`, which must not be None."""
        assert self.dense_embedding is not None
        return self.dense_embedding

    @property
    def head(self) -> torch.Tensor:
        """`dense_head`, which must not be None."""
        assert self.dense_head is not None
        return self.dense_head

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens [n] int64: [n, hidden] float32."""
        if self.coded_embedding is None:
            return nn.functional.embedding(tokens, self.embedding).float()
        return self.coded_embedding[tokens].dequantize()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply normalized states [n, hidden] float32 by the head: [n, vocab] float32."""
        if self.coded_head is None:
            return nn.functional.linear(hidden.to(self.dtype), self.head).float()
        return self.coded_head(hidden)

    def head_rows(self) -> Iterator[Expanded]:
        """Yield the head as plain numbers; see `ServedLinear.expanded`."""
        head = Dense(self.head, None) if self.coded_head is None else self.coded_head
        return head.expanded()


def load_weights(
    folder: Path,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None = None,
    fingerprint: str = "",
    fuse: Fuse = fuse,
) -> DecoderWeights:
    """Load a Hugging Face folder.

    A prequantized folder (with ``quantization_config`` in its config) is loaded as it is,
    whatever ``quantization`` says.

    Args:
        cache_dir: where 4-bit checkpoints are kept; None to keep none.
        fingerprint: `BaseFingerprint.weights`, which is part of the cache's key and which the
            folder's weights must match when they are read; "" if unknown.
        fuse: makes the linears; backends may have their own function.

    Raises:
        UnsupportedModel: the decoder cannot run the model.
        BaseDamaged: the weights do not match the fingerprint.
    """
    config = read_decoder_config(folder)
    if config.stored is not None and config.stored.is_codes:
        with verified(folder, fingerprint) as verify:
            weights = _load_codes(folder, dtype, device)
            verify()
            return weights

    def use(model: Any) -> DecoderWeights:
        with (
            torch.no_grad(),
            stage("packing the weights", total=config.num_layers, unit="layers") as packing,
        ):
            return _take_apart(model.eval(), config, dtype, device, fuse, packing)

    def read(folder: Path, **more: Any) -> Any:
        if device.type == "cuda":
            more["device_map"] = {"": device.index or 0}
        name = "quantizing the base" if "quantization_config" in more else "loading the base"
        with stage(name, unit="tensors") as reading:
            # Imported here because the import takes seconds, which the stage should show.
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging

            logging.disable_progress_bar()
            with _counted(reading):
                return AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
                    folder, dtype=dtype, local_files_only=True, **more
                )

    if config.quantization is not None or quantization == "none":
        with verified(folder, fingerprint) as verify:
            weights = use(read(folder))
            verify()
            return weights
    cache = None
    if cache_dir is not None and fingerprint:
        cache = QuantizedCache(
            cache_dir, folder, fingerprint=fingerprint, quantization=quantization, dtype=dtype
        )
        kept = cache.load(read, use)
        if kept is not None:
            return kept
    with verified(folder, fingerprint) as verify:
        model = read(folder, quantization_config=_four_bit(quantization, dtype))
        verify()
    if cache is not None:
        with stage("writing the 4-bit weights"):
            cache.keep(model)
    return use(model)


def _load_codes(folder: Path, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Load a base whose weights are stored as codes, and keep them so."""
    with Checkpoint(folder) as checkpoint, stage("reading the base", unit="layers") as reading:
        return _Codes(checkpoint, dtype, device).weights(reading)


class _Codes:
    """Reads `DecoderWeights` from a checkpoint, without transformers."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._dtype, self._device = dtype, device

    def weights(self, reading: Stage) -> DecoderWeights:
        config, body = self._config, self._checkpoint.body
        codes, dense = self._table(f"{body}embed_tokens.weight")
        head_codes, dense_head = codes, dense
        if not config.tied_head:
            head_codes, dense_head = self._table("lm_head.weight")
        layers = []
        for index in range(config.num_layers):
            reading.update(index, config.num_layers)
            layers.append(self._layer(index))
        reading.update(config.num_layers)
        frequencies, scale = self._checkpoint.rotary()
        if len(frequencies) != config.head_dim // 2:
            raise UnsupportedModel(
                "partial rotation is not supported", metadata={"key": "rope_type"}
            )
        nbytes = sum(
            linear.nbytes for w in layers for linear in (w.qkv, w.output, w.gate_up, w.down)
        )
        tables = [codes, dense] if config.tied_head else [codes, dense, head_codes, dense_head]
        nbytes += sum(each.nbytes for each in tables if each is not None)
        return DecoderWeights(
            config=config,
            dtype=self._dtype,
            device=self._device,
            dense_embedding=dense,
            dense_head=dense_head,
            final_norm=self._vector(f"{body}norm.weight", config.hidden_size),
            layers=tuple(layers),
            inv_freq=frequencies.to(device=self._device, dtype=torch.float32),
            rotary_scale=scale,
            parameters=self._checkpoint.parameters,
            nbytes=nbytes,
            coded_embedding=codes,
            coded_head=None if head_codes is None else QuantizedLinear(head_codes),
        )

    def _layer(self, index: int) -> LayerWeights:
        config, stem = self._config, f"{self._checkpoint.body}layers.{index}"
        size = config.head_dim

        def head_norm(name: str) -> torch.Tensor | None:
            return self._vector(f"{stem}.self_attn.{name}", size) if config.qk_norm else None

        return LayerWeights(
            input_norm=self._vector(f"{stem}.input_layernorm.weight", config.hidden_size),
            post_norm=self._vector(
                f"{stem}.post_attention_layernorm.weight", config.hidden_size
            ),
            query_norm=head_norm("q_norm.weight"),
            key_norm=head_norm("k_norm.weight"),
            qkv=self._linear(index, ("q_proj", "k_proj", "v_proj")),
            output=self._linear(index, ("o_proj",)),
            gate_up=self._linear(index, ("gate_proj", "up_proj")),
            down=self._linear(index, ("down_proj",)),
        )

    def _vector(self, name: str, size: int) -> torch.Tensor:
        found = self._checkpoint.read(name, (size,))
        return found.to(device=self._device, dtype=torch.float32, copy=True)

    def _table(self, name: str) -> tuple[QuantizedMatrix | None, torch.Tensor | None]:
        """Read the embedding or the head: in codes, or [vocab, hidden] in the serving dtype."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        codes = self._checkpoint.quantized(name, shape)
        if codes is not None:
            return codes.to(self._device), None
        found = self._checkpoint.read(name, shape)
        return None, found.to(device=self._device, dtype=self._dtype, copy=True)

    def _linear(self, index: int, members: tuple[Projection, ...]) -> ServedLinear:
        found = [self._checkpoint.matrix(index, member) for member in members]
        codes = [self._checkpoint.quantized(each.name, each.shape) for each in found]
        biases = [
            self._vector(each.bias, each.shape[0]) if each.bias else None for each in found
        ]
        matrices = [each for each in codes if each is not None]
        if len(matrices) == len(found) and (whole := stacked(matrices)) is not None:
            bias = None
            if any(each is not None for each in biases):
                parts = [
                    torch.zeros(matrix.shape[0], device=self._device) if each is None else each
                    for matrix, each in zip(found, biases, strict=True)
                ]
                bias = torch.cat(parts)
            return QuantizedLinear(whole.to(self._device), bias)
        parts_: list[ServedLinear] = []
        for matrix, code, each in zip(found, codes, biases, strict=True):
            if code is not None:
                parts_.append(QuantizedLinear(code.to(self._device), each))
                continue
            weight = self._checkpoint.read(matrix.name, matrix.shape)
            plain = weight.to(device=self._device, dtype=self._dtype, copy=True)
            parts_.append(Dense(plain, None if each is None else each.to(self._dtype)))
        return parts_[0] if len(parts_) == 1 else SideBySide(parts_)


@contextmanager
def _counted(reading: Stage) -> Iterator[None]:
    """Report progress for each tensor while transformers loads weights."""
    from transformers.utils import logging

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights" or not isinstance(args[0], Sized):
            return factory(*args, **kwargs)
        return each(args[0])

    def each(tensors: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            reading.update(done, len(tensors))
            yield tensor
        reading.update(len(tensors))

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _four_bit(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@contextmanager
def verified(folder: Path, fingerprint: str) -> Iterator[Callable[[], None]]:
    """Hash the base's weights in a thread while they are loaded. Yield a function that waits
    for the hash and checks it.

    This is needed because the fingerprint may have been cached by an earlier start, keyed by
    the files' names, sizes and times: if the disk has lost a bit since, none of these has
    changed.

    Raises:
        BaseDamaged: raised by the yielded function if the weights have changed.
    """
    if not fingerprint:
        yield lambda: None
        return

    def verify() -> None:
        try:
            found = hashing.result()
        except (VeneerError, OSError) as error:
            raise BaseDamaged(
                f"the base in {folder} is damaged: {error}", metadata={"cause": "unreadable"}
            ) from error
        if found != fingerprint:
            raise BaseDamaged(
                f"the weights in {folder} do not match its fingerprint, although the files' "
                "sizes and times do: the disk may be failing. Download the base again; if "
                "you changed the files yourself, touch them",
                metadata={"cause": "digest"},
            )

    with ThreadPoolExecutor(1, thread_name_prefix="verify") as hasher:
        hashing = hasher.submit(weights_fingerprint, folder)
        try:
            yield verify
        except (BaseDamaged, MemoryError):
            raise
        except Exception:
            verify()  # if the files are damaged, that explains the failure better
            raise


def _take_apart(
    model: Any,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    fuse: Fuse,
    packing: Stage,
) -> DecoderWeights:
    body = model.model
    parameters = _count_parameters(model)

    def norm(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight.data
        return weight.to(device=device, dtype=torch.float32)

    layers = []
    for index, layer in enumerate(body.layers):
        packing.update(index)
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            LayerWeights(
                input_norm=norm(layer.input_layernorm),
                post_norm=norm(layer.post_attention_layernorm),
                query_norm=norm(attention.q_norm) if config.qk_norm else None,
                key_norm=norm(attention.k_norm) if config.qk_norm else None,
                qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
                output=fuse([attention.o_proj], dtype),
                gate_up=fuse([mlp.gate_proj, mlp.up_proj], dtype),
                down=fuse([mlp.down_proj], dtype),
            )
        )
        # Free each layer as it is copied, so that memory peaks at one model.
        body.layers[index] = torch.nn.Identity()
    packing.update(len(layers))
    embedding = body.embed_tokens.weight.data.to(device=device, dtype=dtype)
    head = embedding
    if not config.tied_head:
        head = model.lm_head.weight.data.to(device=device, dtype=dtype)
    rotary = body.rotary_emb
    if len(rotary.inv_freq) != config.head_dim // 2:
        # The kernels would read past its end.
        raise UnsupportedModel(
            f"rotary scaling {config.rope!r} has {len(rotary.inv_freq)} frequencies, but "
            f"heads have {config.head_dim} dimensions: partial rotation is not supported",
            metadata={"key": "rope_type"},
        )
    linears = sum(
        linear.nbytes for w in layers for linear in (w.qkv, w.output, w.gate_up, w.down)
    )
    return DecoderWeights(
        config=config,
        dtype=dtype,
        device=device,
        dense_embedding=embedding,
        dense_head=head,
        final_norm=norm(body.norm),
        layers=tuple(layers),
        inv_freq=rotary.inv_freq.to(device=device, dtype=torch.float32),
        rotary_scale=float(rotary.attention_scaling),
        parameters=parameters,
        nbytes=linears + embedding.nbytes + (0 if config.tied_head else head.nbytes),
    )


def _count_parameters(model: Any) -> int:
    """Number of the base model's parameters; a 4-bit weight counts by its unpacked shape."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total
