"""PEFT adapter folder -> the LoRA GGUF that llama.cpp reads; needs the package ``gguf``.

Writes what llama.cpp's own ``convert_lora_to_gguf.py`` writes for a Llama, without torch and
without its source tree. It relies on these facts:

* ``lora_a`` is PEFT's A and ``lora_b`` its B, under the base tensor's GGUF name.
* Hugging Face's Llama stores a head's rotary halves apart (all real parts, then all
  imaginary ones); llama.cpp interleaves them. So the rows of q and k are permuted within
  each head; in an adapter, those are the rows of B. k has its own, smaller, number of heads.
* llama.cpp scales by ``adapter.lora.alpha`` / rank of the tensor, and takes an alpha of
  0 as "no scaling". It supports neither rsLoRA nor an alpha per module, so we multiply
  every module's scaling into its B and set alpha to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from veneer_registry.adapter import Projection
from veneer_registry.format import read_adapter
from veneer_registry.gguf_header import PROJECTION_TENSORS
from veneer_registry.replacing import replacing
from veneer_registry.stored_adapter import open_stored
from veneer_registry.weights import TensorView

Matrix = npt.NDArray[np.float32]


def interleave_halves(rows: Matrix, heads: int) -> Matrix:
    """A q or k projection's rows (weight, bias or lora_B) in llama.cpp's rotary order: in each
    head, row i of the first half, then row i of the second.

    Args:
        rows: [heads * head_dim, ...].
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


@contextmanager
def gguf_file(out: Path, architecture: str) -> Iterator[Any]:
    """A `gguf.GGUFWriter`; its file appears complete at the end of the block, or not at all."""
    with replacing(out) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def write_gguf_adapter(
    folder: Path,
    out: Path,
    *,
    heads: int,
    kv_heads: int,
    permute: Callable[[Matrix, int], Matrix] = interleave_halves,
) -> None:
    """Write ``out`` in float32, the default of llama.cpp's converter.

    Args:
        folder: written by PEFT's ``save_pretrained`` for a base whose architecture is
            ``llama`` in GGUF (Llama, Mistral); the caller must have checked that.
        heads, kv_heads: of the base's attention.
        permute: replaced by a test that omits the permutation.

    Raises:
        AdapterInvalid: the folder is not a LoRA of a decoder's projections.
    """
    rotary: Mapping[Projection, int] = {"q_proj": heads, "k_proj": kv_heads}
    manifest = read_adapter(folder, base=None)
    with (
        gguf_file(out, "llama") as writer,
        open_stored(folder, manifest.weights_digest) as (_, tensors),
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(folder.name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for tensor in tensors:
            module = tensor.module
            b = _float32(tensor.b) * np.float32(module.scaling)
            if module.projection in rotary:
                b = permute(b, rotary[module.projection])
            name = f"blk.{module.layer}.{PROJECTION_TENSORS[module.projection]}.weight"
            writer.add_tensor(f"{name}.lora_a", _float32(tensor.a))
            writer.add_tensor(f"{name}.lora_b", b)


def _float32(view: TensorView) -> Matrix:
    """An exact copy in float32, whatever the file's dtype."""
    if view.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits = np.frombuffer(view.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(view.shape)
    stored = {"F32": "<f4", "F16": "<f2"}[view.dtype]
    return np.frombuffer(view.data, stored).astype(np.float32).reshape(view.shape)
