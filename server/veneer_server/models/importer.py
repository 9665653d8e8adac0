"""Converts a GGUF file into a Hugging Face folder; run as a process.

``python -m veneer_server.models.importer FILE OUT [COUNT]`` writes the numbers of converted
tensors and of all tensors to the file COUNT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

_SMOLLM: Final = "smollm"
"""llama.cpp's name for a tokenizer that splits digits, then bytes."""


def convert(file: Path, out: Path) -> None:
    """Write a GGUF file's model as a Hugging Face folder ``out`` in bfloat16.

    Adds the parts of the tokenizer that transformers does not read from the file: without the
    digit split, the tokens of "1234" differ from the published model's, and padding with the
    token that ends a turn would teach a model never to stop.
    """
    facts = _facts(file)
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        str(file.parent),
        gguf_file=file.name,
        local_files_only=True,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Explicit, because it is written to tokenizer_config.json, which must not depend on
    # HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a local folder
        str(file.parent), gguf_file=file.name, local_files_only=True
    )
    if facts.get("tokenizer.ggml.pre") == _SMOLLM:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
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
    """Return the values from the file's metadata that the conversion needs."""
    fields = GGUFReader(file).fields
    wanted = ("general.architecture", "tokenizer.ggml.pre")
    return {
        name: field.contents()
        for name, field in fields.items()
        if name in wanted or name.endswith(".context_length")
    }


def _count_into(file: Path) -> Callable[..., Iterator[Any]]:
    """Return a replacement for transformers' progress bar that writes to a file."""

    def each(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, 1):
            yield tensor
            file.write_text(f"{done} {len(tensors)}")

    return each


if __name__ == "__main__":
    if len(sys.argv) > 3:
        modeling_gguf_pytorch_utils.tqdm = _count_into(Path(sys.argv[3]))
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
