"""A base of random weights and a given size, for ``--base``.

``python -m tests.gpu.check.random_base 7b FOLDER``. Speed does not depend on what weights are.
Written layer by layer, in bfloat16: 13 GB of disk for 7b, 141 for 70b; the tokenizer is the
bundled base's, and the vocabulary not smaller than its. ``tiny`` is for ``--rehearse``.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from veneer_loadtest.setup import find_base_folder

from tests.gpu.check.steps import LLAMA_7B, LLAMA_70B, Model

TINY: Final = Model(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, head=16, vocab=512)
SHAPES: Final = {"7b": LLAMA_7B, "70b": LLAMA_70B, "tiny": TINY}
NAMES: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write(model: Model, folder: Path, tokenizer: Path) -> None:
    """Write the folder.

    Args:
        tokenizer: a folder whose tokenizer is copied; its vocabulary counts if it is larger.
    """
    model = replace(model, vocab=max(model.vocab, vocabulary_of(tokenizer)))
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head,
        "vocab_size": model.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator, index, total = torch.Generator().manual_seed(0), {}, 0
    for layer in range(-1, model.layers):
        tensors: dict[str, torch.Tensor] = {}
        if layer < 0:
            for name in ("model.embed_tokens", "lm_head"):
                shape = (model.vocab, model.hidden)
                tensors[f"{name}.weight"] = torch.randn(shape, generator=generator)
            tensors["model.norm.weight"] = torch.ones(model.hidden)
        else:
            for name, shape in zip(NAMES, model.linears, strict=True):
                # Outputs about as large as inputs.
                weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
                tensors[f"model.layers.{layer}.{name}.weight"] = weight
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(model.hidden)
        file = f"model-{layer + 2:05}-of-{model.layers + 1:05}.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def vocabulary_of(folder: Path) -> int:
    """One more than a tokenizer's largest id."""
    facts = json.loads((folder / "tokenizer.json").read_bytes())
    added = [token["id"] for token in facts.get("added_tokens", ())]
    return 1 + max([*facts.get("model", {}).get("vocab", {}).values(), *added], default=-1)


if __name__ == "__main__":
    _, size, where = sys.argv
    write(SHAPES[size], Path(where), find_base_folder(None))
