"""Load a base model through transformers and bitsandbytes into decoder weights.

transformers knows every checkpoint layout and rotary scaling, bitsandbytes the
4-bit formats; this module only takes their modules apart. 4-bit weights are
cached as an ordinary prequantized folder, so that a restart takes seconds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from veneer_server.models.config import DecoderConfig, Quantization, read_decoder_config
from veneer_server.models.linear import Linear, fuse

__all__ = ["DecoderWeights", "Fuse", "LayerWeights", "load_weights", "torch_dtype"]

Fuse = Callable[[Sequence[nn.Module], torch.dtype], Linear]
"""One linear for modules that share an input; see `models.linear.fuse`."""

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16``, ``float16`` or ``float32``."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32 [hidden] (or [head_dim])."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The frozen base, ready for the decoder.

    Attributes:
        embedding: [vocab, hidden].
        head: [vocab, hidden]; the same storage as `embedding` where tied.
        inv_freq: [head_dim / 2] float32, rotary frequencies after scaling.
        rotary_scale: factor on cos and sin (YaRN), else 1.
        parameters: of the base model.
        nbytes: bytes of all resident weights.
    """

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device
    embedding: torch.Tensor
    head: torch.Tensor
    final_norm: torch.Tensor
    layers: tuple[LayerWeights, ...]
    inv_freq: torch.Tensor
    rotary_scale: float
    parameters: int
    nbytes: int


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

    A folder that is prequantized (``quantization_config`` in its config) is
    loaded as it is, whatever ``quantization`` says.

    Args:
        cache_dir: where 4-bit checkpoints are kept; None keeps none.
        fingerprint: identity of the weights, part of the cache's key.
        fuse: makes the linears; another backend has its own.

    Raises:
        UnsupportedModel: the decoder cannot run it.
    """
    config = read_decoder_config(folder)
    stored = config.quantization is not None
    model = _load_model(folder, stored, quantization, dtype, device, cache_dir, fingerprint)
    with torch.no_grad():
        return _take_apart(model.eval(), config, dtype, device, fuse)


def _load_model(
    folder: Path,
    stored: bool,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None,
    fingerprint: str,
) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if device.type == "cuda":
        options["device_map"] = {"": device.index or 0}
    if stored or quantization == "none":
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    cached = _cache_folder(cache_dir, quantization, dtype, fingerprint)
    if cached is not None and (cached / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(cached, **options)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        **options,
    )
    if cached is not None:
        _save(model, cached)
    return model


def _cache_folder(
    cache_dir: Path | None, quantization: str, dtype: torch.dtype, fingerprint: str
) -> Path | None:
    if cache_dir is None or not fingerprint:
        return None
    import bitsandbytes
    import transformers

    # Files written by another library version are not trusted to mean the same.
    version = f"bnb{bitsandbytes.__version__}-tf{transformers.__version__}"
    name = f"{fingerprint[:32]}-{quantization}-{str(dtype).removeprefix('torch.')}-{version}"
    return cache_dir / "quantized" / name


def _save(model: Any, target: Path) -> None:
    """Write a prequantized folder; it appears by one rename. Must come before the
    first forward, which packs 4-bit weights for the CPU."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="quantize-"))
    try:
        model.save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        scratch.rename(target)
    except OSError:
        # A full disk or a race only costs the next start its seconds.
        shutil.rmtree(scratch, ignore_errors=True)


def _take_apart(
    model: Any, config: DecoderConfig, dtype: torch.dtype, device: torch.device, fuse: Fuse
) -> DecoderWeights:
    body = model.model
    parameters = _count_parameters(model)

    def norm(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight.data
        return weight.to(device=device, dtype=torch.float32)

    layers = []
    for index, layer in enumerate(body.layers):
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
    embedding = body.embed_tokens.weight.data.to(device=device, dtype=dtype)
    head = embedding
    if not config.tied_head:
        head = model.lm_head.weight.data.to(device=device, dtype=dtype)
    rotary = body.rotary_emb
    linears = sum(
        linear.nbytes for w in layers for linear in (w.qkv, w.output, w.gate_up, w.down)
    )
    return DecoderWeights(
        config=config,
        dtype=dtype,
        device=device,
        embedding=embedding,
        head=head,
        final_norm=norm(body.norm),
        layers=tuple(layers),
        inv_freq=rotary.inv_freq.to(device=device, dtype=torch.float32),
        rotary_scale=float(rotary.attention_scaling),
        parameters=parameters,
        nbytes=linears + embedding.nbytes + (0 if config.tied_head else head.nbytes),
    )


def _count_parameters(model: Any) -> int:
    """Of the base model; a 4-bit weight counts by its quantized shape."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total
