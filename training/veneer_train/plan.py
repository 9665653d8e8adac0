"""Plans the memory of a run before anything is loaded.

The plan is the sum of what exists at the peak, in the backward pass of the first layers:
weights, optimizer state, activations saved by autograd, logits and their gradient. The counts
per token are for transformers' Llama with PEFT (5.24, 0.21), from reading what each operation
saves; the lab ``qlora-vs-lora`` compares them with measured peaks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from veneer_registry.errors import InvalidField

from veneer_train.config import TrainConfig

Method = Literal["qlora", "lora", "full"]
"""Train an adapter on a frozen 4-bit base, one on a frozen 16-bit base, or all weights."""

_DTYPE: Final = 2
"""Bytes of a 16-bit number."""

_QUANT_BITS: Final = {True: 4 + 8 / 64 + 32 / (64 * 256), False: 4 + 32 / 64}
"""Bits per weight, with and without double quantization: an 8-bit scale per 64 weights plus a
32-bit one per 256 of these scales, or a 32-bit scale per 64 weights (arXiv 2305.14314,
section 3)."""

_OPTIMIZER: Final = {
    "adamw_8bit": 2,
    "adamw8bit": 2,
    "paged_adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_32bit": 8,
    "paged_adamw": 8,
    "sgd": 0,
}
"""Bytes of optimizer state per trained parameter. torch's AdamW is not listed: it keeps two
moments in the parameter's dtype."""

_LIBRARIES: Final = {"cpu": 735 << 20, "cuda": 0}
"""Fixed memory of a process: torch, transformers and leftovers of loading the base (none on a
GPU). Measured by `python -m tests.bench.plan_memory`."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a Llama-like base.

    Attributes:
        tied: head and embedding share one tensor.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_out: int
    kv_out: int
    vocab: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each projection of a layer."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_out, self.kv_out
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (i, h),
            "up_proj": (i, h),
            "down_proj": (h, i),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Parameters of embedding, head and norms."""
        tables = 1 if self.tied else 2
        return tables * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


LLAMA_65B: Final = ModelShape("LLaMA-65B", 80, 8192, 22016, 8192, 8192, 32000, tied=False)
"""For comparison with the paper's figures: over 780 GB for full fine-tuning, under 48 GB for
QLoRA."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The memory that a run needs: bytes by purpose."""

    method: Method
    trained_parameters: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def read_shape(folder: Path) -> ModelShape:
    """Read the shape from ``config.json``.

    Raises:
        InvalidField: it is missing, or its shape cannot be planned.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        heads = facts["num_attention_heads"]
        head = facts.get("head_dim") or facts["hidden_size"] // heads
        return ModelShape(
            name=folder.name,
            layers=facts["num_hidden_layers"],
            hidden=facts["hidden_size"],
            intermediate=facts["intermediate_size"],
            q_out=heads * head,
            kv_out=facts.get("num_key_value_heads", heads) * head,
            vocab=facts["vocab_size"],
            tied=bool(facts.get("tie_word_embeddings", False)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidField(
            f"{folder} has no config.json of a Llama-like model ({error!r}): give a Hugging "
            "Face folder with --base",
            metadata={"field": "base"},
        ) from error


def plan(
    shape: ModelShape,
    config: TrainConfig,
    *,
    method: Method = "qlora",
    device: Literal["cpu", "cuda"] = "cpu",
) -> MemoryEstimate:
    """Peak bytes of a run.

    Args:
        config: the run's config; uses ``train``, ``lora``, ``quant.double_quant`` and
            ``data.max_len``.
        method: how to train; the config itself means ``qlora`` or, with ``quant.type: none``,
            ``lora``.
    """
    train = config.train
    trained = _trained(shape, config, method)
    optim = train.optim
    if optim == "auto":
        optim = "paged_adamw_8bit" if device == "cuda" else "adamw_torch_fused"
    recompute = train.checkpointing == "on" or (
        train.checkpointing == "auto" and device == "cuda"
    )
    # Adapters train in fp32, whole models in the dtype they are loaded in.
    width = _DTYPE if method == "full" else 4
    state = _OPTIMIZER.get(optim, 2 * width)
    parts = {
        "libraries": _LIBRARIES[device],
        "base weights": _base_bytes(shape, config, method),
        "trained weights": 0 if method == "full" else trained * width,
        "gradients": trained * width,
        "optimizer": trained * state,
    }
    tokens = train.batch * config.data.max_len
    per_layer = _saved_bytes(shape, config, method)
    inputs = _DTYPE * shape.hidden
    if recompute:
        parts["activations"] = tokens * (shape.layers * inputs + per_layer)
    else:
        parts["activations"] = tokens * shape.layers * per_layer
    # Logits in 16 bits, in fp32 for the loss, and the gradients of both.
    parts["logits"] = tokens * shape.vocab * 2 * (_DTYPE + 4)
    largest = max(rows * columns for rows, columns in shape.linears.values())
    # A 4-bit weight is dequantized for its GEMM.
    parts["workspace"] = largest * _DTYPE if method == "qlora" else 0
    return MemoryEstimate(method, trained, parts)


def _trained(shape: ModelShape, config: TrainConfig, method: Method) -> int:
    if method == "full":
        return shape.parameters
    chosen = [shape.linears[name] for name in config.lora.target_modules]
    return shape.layers * config.lora.r * sum(rows + columns for rows, columns in chosen)


def _base_bytes(shape: ModelShape, config: TrainConfig, method: Method) -> int:
    if method != "qlora":
        return shape.parameters * _DTYPE
    bits = _QUANT_BITS[config.quant.double_quant]
    return int(shape.linear_parameters * bits / 8) + shape.other_parameters * _DTYPE


def _saved_bytes(shape: ModelShape, config: TrainConfig, method: Method) -> int:
    """Bytes that autograd saves per token and layer."""
    h, i, q, kv = shape.hidden, shape.intermediate, shape.q_out, shape.kv_out
    norms = 2 * (4 * h + 2 * h)  # two norms, each with input in fp32 and normalized input
    attention = 2 * (2 * q + 2 * kv) + 2 * q  # q and k rotated, v, the result
    gate = 3 * 2 * i  # gate, its activation, up
    if method == "full":  # inputs of the projections: q, k, v share one; gate and up share one
        return norms + attention + gate + 2 * (h + q + h + i)
    lora = config.lora
    inputs = 0
    for name in lora.target_modules:
        _, columns = shape.linears[name]
        # Each adapter has its own fp32 copy of the input, and a result of A; dropout keeps a
        # mask.
        inputs += 4 * (columns + lora.r) + (columns if lora.dropout else 0)
    return norms + attention + gate + inputs
