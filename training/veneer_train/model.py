"""Loads the frozen 4-bit base, makes it safe to train, and adds a fresh adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import bitsandbytes as bnb
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from veneer_registry.bundle_files import TEMPLATE_LIMIT
from veneer_registry.errors import InvalidField

from veneer_train.config import LoraConfig, QuantConfig

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def training_device() -> torch.device:
    """CUDA if available, else the CPU; with several processes, each has its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_tokenizer(folder: Path) -> Any:
    """The base's fast tokenizer (masks need its character offsets)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615 # a local folder
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InvalidField(
            "the base needs a tokenizer.json and an end-of-sequence token",
            metadata={"field": "model.path"},
        )
    return tokenizer


def read_template(file: str | None, tokenizer: Any) -> str:
    """The chat template to train with: the file's, else the base's; "" if there is none.

    Raises:
        InvalidField: the file cannot be read, or is larger than a server accepts.
    """
    if file is None:
        found = tokenizer.chat_template
        if isinstance(found, dict):  # several named templates
            found = found.get("default")
        return str(found or "")
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            f"cannot read data.template {file!r}: {error}",
            metadata={"field": "data.template", "cause": "unreadable"},
        ) from error
    if len(text.encode()) > TEMPLATE_LIMIT:
        raise InvalidField(
            f"data.template {file!r} is larger than the {TEMPLATE_LIMIT} bytes that a server "
            "accepts: shorten it",
            metadata={"field": "data.template", "limit": str(TEMPLATE_LIMIT)},
        )
    return text


def stored_quantization(folder: Path) -> QuantConfig | None:
    """How a 4-bit folder was quantized; None for a folder that is not in 4 bits."""
    try:
        facts = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(facts, dict) or not facts.get("load_in_4bit"):
        return None
    return QuantConfig(
        type=facts.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(facts.get("bnb_4bit_use_double_quant", False)),
    )


def disable_cpu_packing(model: torch.nn.Module) -> int:
    """Keep every 4-bit layer on the code path that has gradients; returns how many.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks a `Linear4bit`'s weight in
    its first forward pass in eval mode, for a kernel without autograd, and keeps using
    that kernel after ``.train()``: gradients through the layer vanish with only a
    warning. Must be called before the first forward pass.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return _quantized_layers(model)


def _quantized_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def load_base(
    folder: Path, quant: QuantConfig, device: torch.device, *, train: bool = True
) -> Any:
    """Load the base model, quantized and frozen, in eval mode.

    Args:
        train: whether gradients are needed. If False, layers may use a faster kernel that has
            none (see `disable_cpu_packing`).
    """
    dtype = DTYPES[quant.compute_dtype]
    options: dict[str, Any] = {}
    stored = stored_quantization(folder)
    if stored is not None and (stored.type, stored.double_quant) != (
        quant.type,
        quant.double_quant,
    ):
        double = str(stored.double_quant).lower()
        raise InvalidField(
            f"{folder} is in {stored.type} already, with double_quant {double}: set "
            f"quant.type: {stored.type} and quant.double_quant: {double}, or use the 16-bit "
            "folder",
            metadata={"field": "quant.type", "found": stored.type},
        )
    if quant.type != "none" and stored is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        folder,
        dtype=dtype,
        **options,  # omitted rather than None, which would override a 4-bit folder's
        device_map={"": device},
        local_files_only=True,
    )
    replaced = disable_cpu_packing(model) if train else _quantized_layers(model)
    if quant.type != "none" and not replaced:
        raise InvalidField(
            f"no layer of this base was quantized to {quant.type}: bitsandbytes does not "
            "support its kind of linear layer; set quant.type: none",
            metadata={"field": "quant.type"},
        )
    model.requires_grad_(False)
    model.config.use_cache = False  # training does not generate
    return model.eval()


def add_adapter(model: Any, config: LoraConfig) -> Any:
    """``model`` with a fresh LoRA adapter (B = 0: it changes nothing yet).

    The adapter trains in fp32, whatever the base computes in; norms and embeddings keep
    their dtype, so that logits equal the server's.
    """
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.rslora,
        use_dora=config.dora,
        bias="none",
    )
    return peft.get_peft_model(model, lora)
