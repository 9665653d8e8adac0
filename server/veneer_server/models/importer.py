"""Convert the bundled GGUF into a Hugging Face folder; run as a process.

``python -m veneer_server.models.importer WORK OUT``: reads ``WORK/base.gguf``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

__all__ = ["convert"]

CONTEXT: Final = 8192
"""Tokens that SmolLM2 was trained to; the GGUF's tokenizer does not say."""


def convert(work: Path, out: Path) -> None:
    """Write ``work/base.gguf`` as a Hugging Face folder ``out`` in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        str(work),
        gguf_file="base.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(work), gguf_file="base.gguf")
    # The GGUF metadata lacks SmolLM's digit split, its context and its padding
    # token; without these the tokens of "1234" differ from the published model's.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = out.name
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
