"""Make synthetic adapters from one seed.

Adapters differ (B is not zero, and each has its own random numbers). They are saved in PEFT's
format, so that the server and PEFT read the same files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import veneer_client

from veneer_loadtest.errors import BadOption

SCALING: Final = 2.0
"""alpha / rank of the synthetic adapters."""

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

B_STD: Final = 0.05
"""Standard deviation of B: large enough that each adapter changes log-probabilities clearly,
small enough that the model still writes text (see the gate's figures in a result)."""


@dataclass(frozen=True, slots=True)
class BaseSizes:
    """Sizes of a base model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_out: int
    kv_out: int
    vocab: int

    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Module path inside a layer -> (out_features, in_features)."""
        return {
            "self_attn.q_proj": (self.q_out, self.hidden),
            "self_attn.k_proj": (self.kv_out, self.hidden),
            "self_attn.v_proj": (self.kv_out, self.hidden),
            "self_attn.o_proj": (self.hidden, self.q_out),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def read_base_shape(folder: Path) -> BaseSizes:
    """Read the sizes of the base model in a Hugging Face folder.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        KeyError: the config does not describe a Llama-like decoder.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return BaseSizes(
        name=folder.name,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        q_out=heads * head_dim,
        kv_out=int(config.get("num_key_value_heads") or heads) * head_dim,
        vocab=int(config["vocab_size"]),
    )


def served_base_shape(name: str, told: veneer_client.BaseShape) -> BaseSizes:
    """Return the sizes of the base model ``name``, as its server reports them.

    Raises:
        BadOption: the base is not a Llama-like decoder.
    """
    sizes = told.projections
    try:
        shape = BaseSizes(
            name=name,
            layers=told.layers,
            hidden=sizes["q_proj"][1],
            intermediate=sizes["gate_proj"][0],
            q_out=sizes["q_proj"][0],
            kv_out=sizes["k_proj"][0],
            vocab=told.vocabulary,
        )
        ours = {path.rpartition(".")[2]: size for path, size in shape.projections().items()}
        fits = ours == dict(sizes)
    except KeyError:
        fits = False
    if not fits:
        raise BadOption(
            f"the server's base {name!r} has projections that synthetic adapters do not "
            "support: use --names with adapters on that server"
        )
    return shape


def make_adapters(
    folder: Path, base: BaseSizes, *, count: int, rank: int, seed: int
) -> dict[str, Path]:
    """Write ``count`` adapters under ``folder``; return name -> adapter folder."""
    return {
        name: make_adapter(folder / name, base, rank=rank, seed=adapter_seed(seed, i))
        for i, name in enumerate(map(adapter_name, range(count)))
    }


def adapter_name(number: int) -> str:
    """Return the name of synthetic adapter ``number``, from 0."""
    return f"load-{number}"


def adapter_seed(seed: int, number: int) -> int:
    """Return the seed of synthetic adapter ``number`` in a run with ``seed``."""
    return seed * 1000 + number


def make_adapter(
    folder: Path,
    base: BaseSizes,
    *,
    rank: int,
    seed: int,
    targets: Collection[str] = PROJECTIONS,
) -> Path:
    """Write one random adapter for the ``targets`` projections, in bf16; return ``folder``."""
    modules = {
        module: shape
        for module, shape in base.projections().items()
        if module.rpartition(".")[2] in targets
    }
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for layer in range(base.layers):
        for module, (out_features, in_features) in modules.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            a = rng.normal(0.0, in_features**-0.5, (rank, in_features))
            b = rng.normal(0.0, B_STD, (out_features, rank))
            tensors[f"{key}.lora_A.weight"] = to_bfloat16(a)
            tensors[f"{key}.lora_B.weight"] = to_bfloat16(b)
    config = {
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": SCALING * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(m.rpartition(".")[2] for m in modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _write_bf16(folder / "adapter_model.safetensors", tensors)
    return folder


def to_bfloat16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Return the bits of ``values`` rounded to the nearest bfloat16 (ties to even)."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_bf16(path: Path, tensors: Mapping[str, npt.NDArray[np.uint16]]) -> None:
    """Write a safetensors file: header length, JSON header, tensors back to back.

    safetensors' own numpy writer cannot do this, because numpy has no bfloat16.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
