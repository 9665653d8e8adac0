"""Convert a GGUF file into a Hugging Face folder; run as a process.

``python -m veneer_server.models.importer FILE OUT``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

__all__ = ["convert"]

_SMOLLM: Final = "smollm"
"""llama.cpp's name for a tokenizer that splits digits, then bytes."""


def convert(file: Path, out: Path) -> None:
    """Write a GGUF file's model as a Hugging Face folder ``out`` in bfloat16.

    Of the tokenizer, what transformers does not read there is repaired: without the digit
    split the tokens of "1234" differ from the published model's, and padding with the token
    that ends a turn would teach a model never to stop.
    """
    facts = _facts(file)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if facts.get("tokenizer.ggml.pre") == _SMOLLM:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    context = facts.get(f"{facts['general.architecture']}.context_length")
    if context is not None:
        tokenizer.model_max_length = context
    if tokenizer.pad_token in (None, tokenizer.eos_token) and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = out.name
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def _facts(file: Path) -> dict[str, Any]:
    """The plain values of the file's metadata."""
    fields = GGUFReader(file).fields
    wanted = ("general.architecture", "tokenizer.ggml.pre")
    return {
        name: field.contents()
        for name, field in fields.items()
        if name in wanted or name.endswith(".context_length")
    }


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
