"""Writes GGUF files of a model (a base or a merged one), or of an adapter for a base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
from safetensors import safe_open
from veneer_registry.fingerprint import weight_files
from veneer_registry.gguf_adapter import (
    Matrix,
    gguf_file,
    interleave_halves,
    write_gguf_adapter,
)

from veneer_train.llama_cpp.tensors import as_array, read_architecture
from veneer_train.llama_cpp.tokens import add_tokenizer
from veneer_train.merge_report import rounding_of

ModelType = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES: Final = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

_OWN_TYPES: Final[Mapping[str, ModelType]] = {
    "torch.float32": "f32",
    "torch.float16": "f16",
    "torch.bfloat16": "bf16",
}


def export_model(folder: Path, out: Path, kind: ModelType | None = None) -> float:
    """Write a Hugging Face folder of 16- or 32-bit weights as one GGUF file.

    Args:
        kind: type of the matrices; norms stay in float32. None: as in the folder.

    Returns:
        For a merged folder, the share of the norm of the adapter's change that was lost to
        rounding, in merging and here; 0 for any other folder.

    Raises:
        InvalidField: llama.cpp would read the architecture or tokenizer differently.
    """
    architecture = read_architecture(folder)
    config = architecture.config
    data_type, file_type = _TYPES[kind or _OWN_TYPES.get(str(config.dtype), "bf16")]
    merged = rounding_of(folder)
    changed = {f"{module}.weight" for module in merged.modules} if merged else set()
    lost = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    with gguf_file(out, gguf.MODEL_ARCH_NAMES[architecture.kind]) as writer:
        writer.add_type("model")
        writer.add_name(folder.name)
        writer.add_file_type(file_type)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(architecture.heads)
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
        writer.add_rope_dimension_count(architecture.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        add_tokenizer(writer, folder, config.vocab_size)
        for name, tensor in _tensors(folder):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            heads = architecture.heads_of(name)
            array = as_array(tensor)
            if heads is not None:
                array = interleave_halves(array, heads)
            target = architecture.gguf_name(name)
            stored = data_type if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            written = gguf.quantize(array, stored)
            if name in changed:
                error = gguf.dequantize(written, stored).reshape(array.shape) - array
                lost += float(np.square(error, dtype=np.float64).sum())
            writer.add_tensor(target, written, raw_dtype=stored)
    if merged is None or not merged.delta_norm:
        return 0.0
    return float(np.hypot(merged.of_delta, lost**0.5 / merged.delta_norm))


def export_adapter(
    folder: Path,
    base: Path,
    out: Path,
    *,
    permute: Callable[[Matrix, int], Matrix] = interleave_halves,
) -> None:
    """Write an adapter folder as a GGUF adapter for its base's GGUF file.

    Args:
        base: Hugging Face folder of the base.
        permute: replaced by a test that omits the permutation.

    Raises:
        AdapterInvalid: a server would not accept the folder.
    """
    architecture = read_architecture(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf_adapter(
        folder,
        out,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        permute=permute,
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    with ExitStack() as stack:
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, "pt"))
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
