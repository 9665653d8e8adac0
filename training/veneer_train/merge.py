"""Merge an adapter into its base, and say how far the result is from what was trained.

Into the base as it was dequantized (``dequant``): what the server computes, in 16 bits; or into
the 16-bit weights that were quantized (``source``): closer to the original model, and not what
the adapter was trained on. Never back into 4 bits: quantization rounds most of a small adapter
away (a delta of 2 % of the base's norm comes back with a relative error of 1.07).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from veneer_registry.errors import InvalidField

from veneer_train.config import QuantConfig
from veneer_train.model import DTYPES, stored_quantization

__all__ = [
    "Divergence",
    "Into",
    "dequantized_base",
    "divergence",
    "linears",
    "merge",
    "source_base",
]

Into = Literal["dequant", "source"]

_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's next-token distributions are from another's, over some text.

    Attributes:
        largest: greatest difference of two logits.
        relative: norm of the difference of all logits over the norm of the reference's.
        kl: mean Kullback-Leibler divergence from the reference, nats a token.
        same_first: share of places where both would choose the same token.
    """

    largest: float
    relative: float
    kl: float
    same_first: float


def source_base(folder: Path) -> Any:
    """The base in float32, as its files have it.

    Raises:
        InvalidField: the files are in 4 bits.
    """
    if stored_quantization(folder) is not None:
        raise InvalidField(
            f"{folder} is in 4 bits: give the folder in 16 bits that it was made of",
            metadata={"field": "base"},
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.requires_grad_(False).eval()


def dequantized_base(folder: Path, quant: QuantConfig) -> Any:
    """The base in float32, each weight as quantization left it: what a 4-bit layer holds."""
    model = source_base(folder)
    if quant.type == "none":
        return model
    for layer in linears(model):
        # A 4-bit layer restores its weight in the dtype that the model is loaded in.
        weight = layer.weight.to(DTYPES[quant.compute_dtype])
        packed, state = bnb.quantize_4bit(
            weight,
            blocksize=quant.blocksize,
            compress_statistics=quant.double_quant,
            quant_type=quant.type,
        )
        layer.weight.copy_(bnb.dequantize_4bit(packed, state))
    return model


def linears(model: Any) -> Iterator[nn.Linear]:
    """Those that bitsandbytes replaces: all but the head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module


def adapted(base: Any, adapter: Path) -> Any:
    """The base with an adapter on it, in float32; the base itself is changed."""
    model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
    return model.to(torch.float32).eval()


def merge(
    base: Path, adapter: Path, out: Path, into: Into, quant: QuantConfig, *, dtype: torch.dtype
) -> None:
    """Write ``out``, a Hugging Face folder of the merged model.

    Args:
        out: appears whole at the end; must not exist.
        dtype: of the written weights.
    """
    model = dequantized_base(base, quant) if into == "dequant" else source_base(base)
    merged = adapted(model, adapter).merge_and_unload()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        staging = Path(scratch) / "merged"
        merged.to(dtype).save_pretrained(staging)
        for name in _FILES:
            # A template that the adapter ships was what it was trained with.
            for folder in (adapter, base):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
                    break
        for path in (staging, *staging.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(out)


def divergence(model: Any, reference: Any, batches: Sequence[torch.Tensor]) -> Divergence:
    """Compare on token ids, each [batch, length] without padding."""
    largest, kl = 0.0, 0.0
    difference = norm = 0.0
    same = places = 0
    with torch.no_grad():
        for ids in batches:
            told, wanted = model(ids).logits.float(), reference(ids).logits.float()
            gap = told - wanted
            largest = max(largest, float(gap.abs().max()))
            difference += float(gap.double().square().sum())
            norm += float(wanted.double().square().sum())
            logs = wanted.log_softmax(-1)
            kl += float((logs.exp() * (logs - told.log_softmax(-1))).sum())
            same += int((told.argmax(-1) == wanted.argmax(-1)).sum())
            places += ids.numel()
    return Divergence(largest, (difference / norm) ** 0.5, kl / places, same / places)
