"""Quantized weights as GPTQ, AWQ, compressed-tensors and GGUF store them, and what they mean.

Each format is written and read here from its published formulas, in numpy and without our code:
GPTQModel's ``BaseQuantLinear.dequantize_weight``, AutoAWQ's ``WQLinear_GEMM``, and
compressed-tensors' ``pack_to_int32`` and ``dequantize``. Codes are rounded to the nearest: how
well they are chosen does not matter here.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from veneer_registry.fingerprint import weight_files
from veneer_registry.gguf_adapter import gguf_file, interleave_halves
from veneer_train.llama_cpp.tensors import read_architecture
from veneer_train.llama_cpp.tokens import add_tokenizer

Floats = npt.NDArray[np.float32]
Kind = gguf.GGMLQuantizationType

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@dataclass(frozen=True)
class Written:
    """A linear's tensors by suffix, the numbers that they mean, and its quantization_config."""

    tensors: Mapping[str, torch.Tensor]
    weight: Floats
    config: Mapping[str, Any] = field(default_factory=dict)


def words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Put 32 / bits neighbouring columns into each int32, the first in the lowest bits."""
    each = 32 // bits
    parts = codes.reshape(len(codes), -1, each).astype(np.uint32)
    shifts = np.arange(each, dtype=np.uint32) * bits
    return np.bitwise_or.reduce(parts << shifts, axis=2).view(np.int32)


def _rounded(
    weight: Floats, bits: int, group: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[npt.NDArray[np.uint8], Floats, npt.NDArray[np.uint8]]:
    """(codes [rows, columns], scales [rows, groups] as ``dtype`` rounds them, zeros)."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, columns // group, group)
    most = (1 << bits) - 1
    if symmetric:
        wide = np.abs(parts).max(2) / (most // 2)
        zeros = np.full(wide.shape, 1 << (bits - 1), np.uint8)
    else:
        low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
        wide = (high - low) / most
        zeros = np.clip(np.rint(-low / wide), 0, most).astype(np.uint8)
    scales = torch.from_numpy(np.maximum(wide, 1e-4)).to(dtype).float().numpy()
    codes = np.rint(parts / scales[:, :, None]) + zeros[:, :, None]
    return np.clip(codes, 0, most).astype(np.uint8).reshape(rows, columns), scales, zeros


def _meaning(
    codes: npt.NDArray[np.uint8],
    scales: Floats,
    zeros: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.int64],
) -> Floats:
    """scale * (q - zero), in float64 and then float32: exact in both."""
    wide = scales.astype(np.float64)[:, groups]
    return (wide * (codes.astype(np.float64) - zeros.astype(np.float64)[:, groups])).astype(
        np.float32
    )


def gptq(
    weight: Floats,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    form: str = "gptq",
    order: npt.NDArray[np.int64] | None = None,
) -> Written:
    """GPTQ's ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    Args:
        order: inputs in the order in which they were quantized (``desc_act``).
    """
    columns = weight.shape[1]
    order = np.arange(columns) if order is None else order
    sorted_codes, scales, zeros = _rounded(
        weight[:, order], bits, group, symmetric=symmetric, dtype=torch.float16
    )
    codes = np.empty_like(sorted_codes)
    codes[:, order] = sorted_codes
    groups = np.empty(columns, np.int64)
    groups[order] = np.arange(columns) // group
    stored = zeros - 1 if form == "gptq" else zeros  # wraps: 0 is stored as 15
    tensors = {
        "qweight": words(np.ascontiguousarray(codes.T).T, bits).T,
        "qzeros": words(np.ascontiguousarray(stored.T) & ((1 << bits) - 1), bits),
        "scales": scales.T.astype(np.float16),
        "g_idx": groups.astype(np.int32),
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": not np.array_equal(order, np.arange(columns)),
        "sym": symmetric,
        "checkpoint_format": form,
    }
    return Written(_torch(tensors), _meaning(codes, scales, zeros, groups), config)


def shuffled_gptq(weight: Floats) -> Written:
    """GPTQ's tensors with ``desc_act``, in groups of 32; linears of one width share the order,
    as those of one input do."""
    order = np.random.default_rng(weight.shape[1]).permutation(weight.shape[1])
    return gptq(weight, group=32, order=order)


def awq(weight: Floats, *, group: int = 64) -> Written:
    """AutoAWQ's ``qweight``, ``qzeros`` and ``scales``, version ``gemm``."""
    rows, columns = weight.shape
    codes, scales, zeros = _rounded(weight, 4, group, symmetric=False, dtype=torch.float16)

    def packed(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        parts = numbers.T.reshape(-1, rows // 8, 8)[:, :, AWQ_ORDER]
        return words(parts.reshape(-1, rows), 4)

    tensors = {
        "qweight": packed(codes),
        "qzeros": packed(zeros),
        "scales": scales.T.astype(np.float16),
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    groups = np.arange(columns) // group
    return Written(_torch(tensors), _meaning(codes, scales, zeros, groups), config)


def compressed(
    weight: Floats,
    *,
    bits: int = 4,
    group: int | None = 64,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Written:
    """compressed-tensors' ``pack-quantized``.

    Args:
        group: None for one scale for each output (the strategy ``channel``).
    """
    rows, columns = weight.shape
    size = group or columns
    codes, scales, zeros = _rounded(weight, bits, size, symmetric=symmetric, dtype=dtype)
    tensors = {
        "weight_packed": torch.from_numpy(words(codes, bits)),
        "weight_scale": torch.from_numpy(scales).to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        each = 32 // bits
        tall = np.pad(zeros, ((0, -rows % each), (0, 0)))
        tensors["weight_zero_point"] = torch.from_numpy(words(tall.T.copy(), bits).T.copy())
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group is None else "group",
                    "group_size": group,
                    "dynamic": False,
                    "actorder": None,
                },
            }
        },
    }
    groups = np.arange(columns) // size
    return Written(tensors, _meaning(codes, scales, zeros, groups), config)


def mxfp4(weight: Floats) -> Written:
    """compressed-tensors' ``mxfp4-pack-quantized``."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, 32)
    exponents = np.floor(np.log2(np.maximum(np.abs(parts).max(2), 1e-30))).astype(int) - 2
    scales = 2.0 ** exponents[:, :, None]
    table = np.array(E2M1)
    codes = np.abs(parts[..., None] / scales[..., None] - table).argmin(-1)
    codes = codes.astype(np.uint8)
    meant = (table[codes] * scales).reshape(rows, columns).astype(np.float32)
    pairs = codes.reshape(rows, -1, 2)
    tensors = {
        "weight_packed": pairs[:, :, 0] | (pairs[:, :, 1] << 4),
        "weight_scale": (exponents + 127).astype(np.uint8),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
    }
    return Written(_torch(tensors), meant, config)


def _torch(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in tensors.items()
    }


# ------------------------------------------------------------------------------- GGUF


@functools.cache
def _library() -> Any:
    """llama.cpp, inside a module: for types that the package ``gguf`` cannot write."""
    import xllamacpp

    (file,) = Path(xllamacpp.__file__).parent.glob("*.so")
    found = ctypes.CDLL(str(file))
    quantize = found.ggml_quantize_chunk
    quantize.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    quantize.restype = ctypes.c_size_t
    found.ggml_quantize_init.argtypes = [ctypes.c_int]
    return found


def quantized(weight: Floats, kind: Kind) -> npt.NDArray[Any]:
    """A matrix in a GGUF type, as the package's writer takes it: [rows, bytes] uint8, quantized
    by llama.cpp's own code."""
    weight = np.ascontiguousarray(weight, np.float32)
    if kind == Kind.F32:
        return weight
    if kind in (Kind.F16, Kind.BF16):
        return gguf.quantize(weight, kind)
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert columns % block == 0, "the library would write past the end"
    out = np.zeros((rows, columns // block * size), np.uint8)
    library = _library()
    library.ggml_quantize_init(int(kind))
    done = library.ggml_quantize_chunk(
        int(kind), weight.ctypes.data, out.ctypes.data, 0, rows, columns, None
    )
    assert done == out.size
    return out


_SMALLER = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""What llama-quantize takes for rows that are not whole blocks of 256."""


def q4_k_m(name: str) -> Kind:
    """The types of llama-quantize's Q4_K_M, for a base of 30 layers."""
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < 30 // 8 or layer >= 7 * 30 // 8 or (layer - 30 // 8) % 3 == 2
    if name == "token_embd.weight" or (more and ("attn_v" in name or "ffn_down" in name)):
        return Kind.Q6_K
    return Kind.Q4_K


def write_base(
    folder: Path, out: Path, kind_of: Callable[[str], Kind], *, layers: int | None = None
) -> Path:
    """Write a Llama's Hugging Face folder as a GGUF file with quantized matrices.

    Args:
        layers: write only the first layers; None: all.
    """
    architecture = read_architecture(folder)
    config = architecture.config
    layers = layers or config.num_hidden_layers
    with gguf_file(out, "llama") as writer:
        writer.add_type("model")
        writer.add_name("SmolLM2 135M Instruct")
        writer.add_organization("HuggingFaceTB")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(architecture.heads)
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_rope_dimension_count(architecture.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        add_tokenizer(writer, folder, config.vocab_size)
        (file,) = weight_files(folder)
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                parts = name.split(".")
                if "layers" in parts and int(parts[2]) >= layers:
                    continue
                array = opened.get_tensor(name).float().numpy()
                heads = architecture.heads_of(name)
                if heads is not None:
                    array = interleave_halves(array, heads)
                target = architecture.gguf_name(name)
                if array.ndim < 2:
                    writer.add_tensor(target, array)
                    continue
                kind = fitting(kind_of(target), array)
                writer.add_tensor(target, quantized(array, kind), raw_dtype=kind)
    return out


def fitting(kind: Kind, weight: Floats) -> Kind:
    """The type that llama-quantize takes for a matrix instead of ``kind``, if that needs longer
    rows."""
    return _SMALLER[kind] if weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def write_tiny(model: Any, out: Path, kind: Kind = Kind.F32, **facts: Any) -> Path:
    """Write transformers' model as a GGUF file, with a vocabulary of single bytes.

    Args:
        facts: more metadata, with ``__`` for each dot; a key without a dot belongs to the
            architecture.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    (number,) = (each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    with gguf_file(out, architecture) as writer:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        for key, value in facts.items():
            name = key.replace("__", ".")
            name = name if "." in name else f"{architecture}.{name}"
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add = writer.add_float32 if isinstance(value, float) else add
            add(name, value)
        write_bytes_vocabulary(writer, config.vocab_size)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            array = tensor.float().numpy()
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads
                heads = config.num_key_value_heads if "k_proj" in name else heads
                array = interleave_halves(array, heads)
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            data = quantized(array, kind) if array.ndim > 1 else array
            writer.add_tensor(target, data, raw_dtype=kind if array.ndim > 1 else Kind.F32)
        if config.rope_parameters.get("rope_type") == "llama3":
            turned = model.model.rotary_emb.inv_freq.numpy()
            even = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
            plain = config.rope_parameters["rope_theta"] ** -even
            writer.add_tensor("rope_freqs.weight", (plain / turned).astype(np.float32))
    return out


def write_bytes_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A vocabulary of GPT-2's 256 bytes and one merge, with special tokens and padding."""
    letters = [chr(each) for each in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + each) for each in range(256 - len(letters))]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab"]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_folder(
    folder: Path, out: Path, form: Callable[[Floats], Written], *, layers: int | None = None
) -> Path:
    """Write a Llama's Hugging Face folder with quantized linears, as the tools of GPTQ, AWQ and
    compressed-tensors do; embedding and norms stay as they are."""
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "veneer_manifest.json":
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_bytes())
    layers = layers or config["num_hidden_layers"]
    config["num_hidden_layers"] = layers
    (file,) = weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 # not a dictionary
            parts = name.split(".")
            if "layers" in parts and int(parts[2]) >= layers:
                continue
            tensor = opened.get_tensor(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            written = form(tensor.float().numpy())
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{each}": found for each, found in written.tensors.items()}
            config["quantization_config"] = written.config
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out
