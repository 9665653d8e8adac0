"""Names of adapter tensors, as PEFT writes them for the projections of a decoder layer.

Trainers that save a model's own state write two variants: without PEFT's prefix
``base_model.model.``, and with the adapter's name (``lora_A.default.weight``).
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple, cast

from veneer_registry.adapter import PROJECTIONS, Projection

Side = Literal["A", "B"]

_BLOCK: Final[dict[Projection, str]] = {
    name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    for name in PROJECTIONS
}

PREFIX: Final = "base_model.model."
"""PEFT's prefix of the names of a base's modules."""

_NAME: Final = re.compile(
    r"(?P<prefix>base_model\.model\.)?model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\."
    r"(?P<block>self_attn|mlp)\.(?P<projection>[a-z]{1,4}_proj)\.lora_(?P<side>[AB])"
    r"(?:\.(?P<adapter>[A-Za-z0-9_-]{1,64}))?\.weight"
)
_EMBEDDINGS: Final = ("model.embed_tokens.weight", "lm_head.weight")


class TensorName(NamedTuple):
    """The parts of a tensor's name.

    Attributes:
        variant: whether it has PEFT's prefix, and the adapter's name or "". All names in a
            file must have the same variant.
    """

    layer: int
    projection: Projection
    side: Side
    variant: tuple[bool, str]


def module_path(layer: int, projection: Projection) -> str:
    """The module's name, as PEFT matches it with ``rank_pattern`` and ``alpha_pattern``."""
    return f"model.layers.{layer}.{_BLOCK[projection]}.{projection}"


def tensor_keys(layer: int, projection: Projection) -> tuple[str, str]:
    """Names of A and B of one projection."""
    stem = f"{PREFIX}{module_path(layer, projection)}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def parse_tensor_name(name: str) -> TensorName | None:
    """Parse a tensor's name; None if it is not a LoRA matrix of a projection."""
    match = _NAME.fullmatch(name)
    if match is None or match["projection"] not in _BLOCK:
        return None
    projection = cast(Projection, match["projection"])
    if _BLOCK[projection] != match["block"]:
        return None
    variant = (match["prefix"] is not None, match["adapter"] or "")
    return TensorName(int(match["layer"]), projection, cast(Side, match["side"]), variant)


def embedding_name(name: str) -> str | None:
    """Return the base's name for an embedding or head that PEFT saves whole beside the adapter,
    or None for any other tensor."""
    plain = name.removeprefix(PREFIX)
    return plain if plain in _EMBEDDINGS else None
