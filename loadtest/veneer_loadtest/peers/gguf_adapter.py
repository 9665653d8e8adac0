"""PEFT adapter folder -> the LoRA GGUF that llama.cpp reads.

What llama.cpp's own ``convert_lora_to_gguf.py`` writes for a Llama, without torch and
without its source tree. Facts that it rests on:

* ``lora_a`` is PEFT's A and ``lora_b`` its B, under the base tensor's GGUF name.
* The rotary halves of a head are apart in Hugging Face's Llama (first all real parts,
  then all imaginary ones) and side by side in llama.cpp's. So rows of q and k are
  permuted in each head, and of an adapter that is the rows of B; k by its own, fewer,
  heads.
* llama.cpp scales by ``adapter.lora.alpha`` / rank of the tensor, and takes an alpha of
  0 for "no scaling". It knows neither rsLoRA nor an alpha of a module's own: what
  differs from the one alpha is multiplied into B here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from veneer_registry.adapter import Projection
from veneer_registry.format import open_stored, read_adapter
from veneer_registry.weights import TensorView

from veneer_loadtest.peer import PeerError

__all__ = ["write_gguf_adapter"]

_ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})
"""Those that are ``llama`` in GGUF, with permuted q and k."""

_TENSORS: Final[Mapping[Projection, str]] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}

Matrix = npt.NDArray[np.float32]


def write_gguf_adapter(folder: Path, base_folder: Path, out: Path) -> None:
    """Write ``out`` in float32, the type that llama.cpp's converter takes by default.

    Args:
        folder: what PEFT's ``save_pretrained`` wrote.
        base_folder: Hugging Face folder of the base; only its ``config.json`` is read.

    Raises:
        AdapterInvalid: the folder is no LoRA of a decoder's projections.
        PeerError: the base is no Llama.
    """
    heads = _heads(base_folder)
    manifest = read_adapter(folder, None)
    # Modules with a scaling of 0 are zeroed in B, so any other's alpha will do.
    alpha = next((m.scaling * m.rank for m in manifest.modules if m.scaling), 1.0)
    writer: Any = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    with open_stored(folder, manifest.weights_digest) as (_, tensors):
        for tensor in tensors:
            module = tensor.module
            b = _float32(tensor.b)
            factor = module.scaling * module.rank / alpha
            if factor != 1:
                b *= np.float32(factor)
            if module.projection in heads:
                b = _interleave_halves(b, heads[module.projection])
            name = f"blk.{module.layer}.{_TENSORS[module.projection]}.weight"
            writer.add_tensor(f"{name}.lora_a", _float32(tensor.a))
            writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(base_folder: Path) -> Mapping[Projection, int]:
    """Heads of the projections that the rotary embedding follows."""
    config = json.loads((base_folder / "config.json").read_text("utf-8"))
    architectures = config.get("architectures") or ["no architecture"]
    if not _ARCHITECTURES.intersection(architectures):
        raise PeerError(
            f"adapters of {', '.join(architectures)} cannot be written for llama.cpp yet: "
            "compare with it over a base of the Llama architecture"
        )
    heads = int(config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}


def _interleave_halves(rows: Matrix, heads: int) -> Matrix:
    """[heads x head_dim, rank]: in each head, row i of the second half after row i of
    the first."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _float32(view: TensorView) -> Matrix:
    """A copy, exact whatever the file's type."""
    if view.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits = np.frombuffer(view.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(view.shape)
    stored = {"F32": "<f4", "F16": "<f2"}[view.dtype]
    return np.frombuffer(view.data, stored).astype(np.float32).reshape(view.shape)
