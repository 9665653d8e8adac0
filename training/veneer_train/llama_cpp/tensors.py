"""Names and layouts of a decoder's tensors in GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from transformers import AutoConfig
from veneer_registry.errors import InvalidField

_SUPPORTED: Final = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA}
"""transformers' model types; llama.cpp calls both llama."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The facts that an export needs from a base's config."""

    config: Any
    kind: gguf.MODEL_ARCH
    names: gguf.TensorNameMap

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.heads)

    def heads_of(self, name: str) -> int | None:
        """Heads of a q or k projection, whose rows llama.cpp stores in another order; None
        for any other tensor."""
        if ".q_proj." in name:
            return self.heads
        return self.kv_heads if ".k_proj." in name else None

    def gguf_name(self, name: str) -> str:
        """GGUF's name for transformers' tensor ``name`` (with or without ``.weight``).

        Raises:
            InvalidField: GGUF has no such tensor.
        """
        found: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InvalidField(
                f"tensor {name} has no place in GGUF's {gguf.MODEL_ARCH_NAMES[self.kind]}: "
                "export a Llama or Mistral model",
                metadata={"field": "base"},
            )
        return found


def read_architecture(folder: Path) -> Architecture:
    """Read the architecture of a Hugging Face folder.

    Raises:
        InvalidField: this architecture cannot be exported here.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)  # nosec B615 # a local folder
    kind = _SUPPORTED.get(config.model_type)
    if kind is None:
        raise InvalidField(
            f"a {config.model_type} model cannot be exported here, only "
            f"{', '.join(_SUPPORTED)}: use llama.cpp's own converter on the merged folder "
            "(veneer-train merge)",
            metadata={"field": "base", "model_type": config.model_type},
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise InvalidField(
            f"rotary scaling {rope['rope_type']!r} cannot be exported here: use llama.cpp's "
            "own converter on the merged folder (veneer-train merge)",
            metadata={"field": "base"},
        )
    return Architecture(config, kind, gguf.get_tensor_name_map(kind, config.num_hidden_layers))


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor as an array of float32."""
    return tensor.detach().to(torch.float32).numpy()
