"""Merges an adapter into its base, and measures how far the result is from what was trained.

The target is either the dequantized base (``dequant``), which is what the server computes with,
or the original 16-bit weights (``source``), which are closer to the original model but not what
the adapter was trained on. We never merge back into 4 bits: quantization rounds most of a small
adapter away (a delta of 2 % of the base's norm gets a relative error of 1.07). bfloat16, whose
steps are 1/256 of a weight, also loses much of a lightly trained adapter: `Rounding` says how
much.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM
from veneer_registry.bundle_files import select_files
from veneer_registry.errors import InvalidField
from veneer_registry.replacing import new_folder

from veneer_train.config import QuantConfig
from veneer_train.model import DTYPES as COMPUTE_DTYPES
from veneer_train.model import stored_quantization

Into = Literal["dequant", "source"]
Dtype = Literal["bfloat16", "float16", "float32"]

DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Dtype of a merged model's weights."""

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
        largest: largest difference of a logit.
        relative: norm of the difference of all logits over the norm of the reference's.
        kl: mean Kullback-Leibler divergence from the reference, in nats per token.
        same_first: share of positions where both would choose the same token.
    """

    largest: float
    relative: float
    kl: float
    same_first: float


@dataclass(frozen=True, slots=True)
class Rounding:
    """How much of the adapter's change is lost by writing a merged model in a dtype.

    Attributes:
        of_delta: norm of the rounding error over the norm of the delta, over all weights
            that the adapter changes; 0 if it changes none.
        worst: the same for the weight that loses most.
        worst_module: its module, ``model.layers.0.self_attn.q_proj``; "" if none changes.
        delta_norm: norm of all deltas.
        modules: number of modules that the adapter changes.
    """

    of_delta: float
    worst: float
    worst_module: str
    delta_norm: float
    modules: tuple[str, ...]


def source_base(folder: Path) -> Any:
    """The base's weights from its files, in float32.

    Raises:
        InvalidField: the files are in 4 bits.
    """
    if stored_quantization(folder) is not None:
        raise InvalidField(
            f"{folder} is in 4 bits: give the 16-bit folder that it was made from",
            metadata={"field": "base"},
        )
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.requires_grad_(False).eval()


def dequantized_base(folder: Path, quant: QuantConfig) -> Any:
    """The base in float32, with each weight quantized and dequantized as in a 4-bit layer."""
    model = source_base(folder)
    if quant.type == "none":
        return model
    for layer in linears(model):
        # A 4-bit layer restores its weight in the dtype that the model is loaded in.
        weight = layer.weight.to(COMPUTE_DTYPES[quant.compute_dtype])
        packed, state = bnb.quantize_4bit(
            weight,
            blocksize=quant.blocksize,
            compress_statistics=quant.double_quant,
            quant_type=quant.type,
        )
        layer.weight.copy_(bnb.dequantize_4bit(packed, state))
    return model


def linears(model: Any) -> Iterator[nn.Linear]:
    """The linear layers that bitsandbytes replaces: all except the head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module


def adapted(base: Any, adapter: Path) -> Any:
    """The base with an adapter, in float32. Modifies the base."""
    model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
    return model.to(torch.float32).eval()


def _merged(model: Any, dtype: torch.dtype) -> tuple[Any, Rounding]:
    """Merge the adapter. Return the model, still in float32, and how much of the change
    ``dtype`` will lose. Works module by module, to avoid a second copy of the model."""
    error = delta = 0.0
    worst, worst_module, modules = 0.0, "", []
    with torch.no_grad():
        for path, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            layer = module.get_base_layer()
            before = layer.weight.clone()
            module.merge()
            changed = float((layer.weight - before).double().square().sum())
            lost = _lost(layer.weight, dtype)
            if not changed:
                continue
            name = path.removeprefix("base_model.model.")
            modules.append(name)
            delta, error = delta + changed, error + lost
            if (share := (lost / changed) ** 0.5) > worst:
                worst, worst_module = share, name
    of_delta = (error / delta) ** 0.5 if delta else 0.0
    return model.unload(), Rounding(of_delta, worst, worst_module, delta**0.5, tuple(modules))


def _lost(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Squared norm of the error of rounding to ``dtype``."""
    return float((weight.to(dtype).to(weight.dtype) - weight).double().square().sum())


def _check_range(model: Any, dtype: torch.dtype) -> None:
    """Raise InvalidField for weights that are not finite in ``dtype``."""
    for name, weight in model.named_parameters():
        if bool(weight.to(dtype).isfinite().all()):
            continue
        largest = float(weight.abs().max())
        told = str(dtype).removeprefix("torch.")
        fix = (
            "use --dtype bfloat16 or float32"
            if math.isfinite(largest)
            else "the adapter or its base is damaged: run veneer-train verify to see which"
        )
        raise InvalidField(
            f"{name} has a magnitude of {largest:.4g}, which {told} cannot hold: {fix}",
            metadata={"field": "dtype", "tensor": name},
        )


def merge(
    base: Path, adapter: Path, out: Path, into: Into, quant: QuantConfig, *, dtype: torch.dtype
) -> Rounding:
    """Write ``out``, a Hugging Face folder of the merged model.

    Args:
        out: must not exist; appears complete at the end.
        dtype: dtype of the written weights.

    Raises:
        AdapterInvalid: a file of the adapter is missing, or not a regular file.
        InvalidField: a weight is not finite in ``dtype``.
    """
    select_files(adapter)  # PEFT would open any file, even pickles
    model = dequantized_base(base, quant) if into == "dequant" else source_base(base)
    merged, rounding = _merged(adapted(model, adapter), dtype)
    _check_range(merged, dtype)
    with new_folder(out) as staging:
        merged.to(dtype).save_pretrained(staging)
        for name in _FILES:
            # If the adapter ships a template, it was trained with that one.
            for folder in (adapter, base):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
                    break
    return rounding


def divergence(model: Any, reference: Any, batches: Sequence[torch.Tensor]) -> Divergence:
    """Compare two models on token ids, each [batch, length] without padding."""
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
            # float64: terms of both signs nearly cancel, and float32 is off by 1e-8, as often
            # below 0 as above. A divergence is never negative, so clamp rounding errors to 0.
            p, q = wanted.double().log_softmax(-1), told.double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).clamp(min=0).sum())
            same += int((told.argmax(-1) == wanted.argmax(-1)).sum())
            places += ids.numel()
    return Divergence(largest, (difference / norm) ** 0.5, kl / places, same / places)
