"""Make a Llama with random weights, small enough to serve thousands of requests in seconds.

It is a Hugging Face folder like any other: config, weights, a byte-level BPE tokenizer trained
here on a few sentences, and a chat template. Nothing is downloaded. The sizes are the smallest
that bitsandbytes' 4-bit GEMMs accept (rows % 32 = 0, columns % 64 = 0). The weights are
ten times larger than a usual initialisation, so that distributions differ between prompts
and between adapters by far more than rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.adapter_files import write_adapter, write_safetensors

HIDDEN: Final = 64
INNER: Final = 128
LAYERS: Final = 3
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD: Final = HIDDEN // HEADS
CONTEXT: Final = 512
VOCABULARY: Final = 512
END: Final = 0

SHAPES: Final = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Module -> (out_features, in_features)."""

_SPREAD: Final = 0.2
"""Standard deviation of the weights."""

_SPECIAL: Final = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT: Final = (
    "A frozen base model stays in memory, and thin adapters are laid on it for each request.",
    "One day a fox met a crow who had found a piece of cheese, and asked her for a song.",
    "The ship left the harbour before dawn; nobody on the quay had seen who was on board.",
    "Write a query that counts the orders of every customer in the last thirty days.",
    "Seven times eight is fifty-six, and the square of twelve is one hundred forty-four.",
    "Please translate the following sentence, and explain why you chose each of the words.",
)
_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write the base into ``folder`` (created if missing); the same files for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    write_safetensors(folder / "model.safetensors", _weights(np.random.default_rng(seed)))
    _write_tokenizer(folder)
    return folder


def make_lora(
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    modules: tuple[str, ...] = tuple(SHAPES),
    bfloat16: bool = False,
) -> Path:
    """Write an adapter for the base: random A and B in all layers, in PEFT's layout.

    Args:
        modules: keys of `SHAPES`.
        bfloat16: store bfloat16 instead of float32; numbers are rounded towards zero.
    """
    random = np.random.default_rng(seed)

    def stored(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        numbers = matrix.astype(np.float32)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else numbers

    tensors: dict[str, npt.NDArray[Any]] = {}
    for layer in range(LAYERS):
        for module in modules:
            rows, columns = SHAPES[module]
            stem = f"base_model.model.model.layers.{layer}.{module}"
            a = random.normal(size=(rank, columns)) / np.sqrt(columns)
            # Makes B A x about as large as the base's output, for every rank.
            b = random.normal(size=(rows, rank)) / np.sqrt(rank)
            tensors[f"{stem}.lora_A.weight"] = stored(a)
            tensors[f"{stem}.lora_B.weight"] = stored(b)
    targets = sorted(module.partition(".")[2] for module in modules)
    write_adapter(folder, {"r": rank, "lora_alpha": rank, "target_modules": targets}, tensors)
    return folder


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": END,
        "dtype": "float32",
    }


def _weights(random: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return (_SPREAD * random.normal(size=shape)).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    tensors: dict[str, npt.NDArray[Any]] = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.input_layernorm.weight"] = ones
        tensors[f"{stem}.post_attention_layernorm.weight"] = ones
        for module, shape in SHAPES.items():
            tensors[f"{stem}.{module}.weight"] = normal(*shape)
    return tensors


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[0],
        "pad_token": _SPECIAL[0],
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
