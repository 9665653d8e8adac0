"""Names of adapter tensors, as PEFT writes them for the projections of a decoder layer."""

from __future__ import annotations

import re
from typing import Final, Literal, cast

from veneer_registry.adapter import PROJECTIONS, Projection

__all__ = ["Side", "module_path", "parse_tensor_name", "tensor_keys"]

Side = Literal["A", "B"]

_BLOCK: Final[dict[Projection, str]] = {
    name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    for name in PROJECTIONS
}

_NAME: Final = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\."
    r"(?P<block>self_attn|mlp)\.(?P<projection>[a-z]{1,4}_proj)\.lora_(?P<side>[AB])\.weight"
)


def module_path(layer: int, projection: Projection) -> str:
    """The module's name, as PEFT matches it with ``rank_pattern`` and ``alpha_pattern``."""
    return f"model.layers.{layer}.{_BLOCK[projection]}.{projection}"


def tensor_keys(layer: int, projection: Projection) -> tuple[str, str]:
    """Names of A and B of one projection."""
    stem = f"base_model.model.{module_path(layer, projection)}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def parse_tensor_name(name: str) -> tuple[int, Projection, Side] | None:
    """(layer, projection, side) of a tensor name, or None if it is not an adapter tensor."""
    match = _NAME.fullmatch(name)
    if match is None or match["projection"] not in _BLOCK:
        return None
    projection = cast(Projection, match["projection"])
    if _BLOCK[projection] != match["block"]:
        return None
    return int(match["layer"]), projection, cast(Side, match["side"])
