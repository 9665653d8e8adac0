"""Write adapters in the formats of mlx-lm and llama.cpp, as those projects document them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.weights import WEIGHTS_FILE

from tests.adapter_files import parse_header, write_safetensors

EXAMPLE: Final = Path(__file__).parents[1] / "examples/adapters/chat"

Arrays = dict[str, "np.ndarray[Any, Any]"]


def read_arrays(path: Path) -> Arrays:
    """Read the tensors of a safetensors file; bfloat16 tensors are returned as uint16."""
    data = path.read_bytes()
    stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    return {
        name: np.frombuffer(data[info.begin : info.end], stored[info.dtype]).reshape(info.shape)
        for name, info in parse_header(path).tensors.items()
    }


def float32(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert to float32 exactly; uint16 holds bfloat16 bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def write_mlx(peft: Path, out: Path, **config: Any) -> Path:
    """Write an adapter as ``mlx_lm.lora`` does: ``lora_a`` [inputs, rank] and ``lora_b`` [rank,
    outputs]."""
    settings = json.loads((peft / CONFIG_FILE).read_text())
    out.mkdir()
    tensors = {}
    for name, array in read_arrays(peft / WEIGHTS_FILE).items():
        stem, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        tensors[f"{stem}.{side.lower()}"] = np.ascontiguousarray(array.T)
    write_safetensors(out / "adapters.safetensors", tensors)
    _without_metadata(out / "adapters.safetensors")
    rank = settings["r"]
    whole = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {
            "rank": rank,
            "dropout": 0.0,
            "scale": settings["lora_alpha"] / rank,
        },
        "model": "mlx-community/SmolLM2-135M-Instruct-4bit",
        "iters": 100,
        **config,
    }
    (out / CONFIG_FILE).write_text(json.dumps(whole))
    return out


def _without_metadata(path: Path) -> None:
    """Set ``"__metadata__": null``, as ``mlx.core.save_safetensors`` does."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:begin]), "__metadata__": None}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[begin:])


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Permute rows like llama.cpp's ``LlamaModel.permute``."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


_NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    peft: Path,
    out: Path,
    *,
    heads: tuple[int, int] = (9, 3),
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str = "llama",
    facts: Mapping[str, Any] | None = None,
    alpha: float | None = None,
) -> Path:
    """Write an adapter as ``convert_lora_to_gguf.py`` does: A and B unscaled, q and k of a
    llama interleaved, alpha as a separate field."""
    settings = json.loads((peft / CONFIG_FILE).read_text())
    writer = gguf.GGUFWriter(out, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(
        gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"] if alpha is None else alpha
    )
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/unsloth/SmolLM2-135M-Instruct")
    writer.add_array("general.tags", ["lora", "text-generation"])
    for key, value in (facts or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, stored in read_arrays(peft / WEIGHTS_FILE).items():
        _, _, _, _, layer, block, projection, side, _ = name.split(".")
        array = float32(stored)
        rotary = {"q_proj": heads[0], "k_proj": heads[1]} if arch == "llama" else {}
        if side == "lora_B" and projection in rotary:
            array = interleaved(array, rotary[projection])
        target = f"blk.{layer}.{_NAMES[f'{block}.{projection}']}.weight.{side.lower()}"
        row = array.shape[-1]
        written = kind if row % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quantize(array, written), raw_dtype=written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
