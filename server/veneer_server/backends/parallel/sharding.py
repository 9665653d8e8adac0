"""Which part of each projection a tensor-parallel process holds. Plain arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from veneer_registry.adapter import Projection

from veneer_server.models.config import DecoderConfig, UnsupportedModel

_BY_INPUT: Final = ("o_proj", "down_proj")
BLOCK: Final = 64
"""Inputs that share one scale of a quantized weight. A projection that is divided by input is
only cut between such blocks."""


def divided_inputs(projection: Projection) -> bool:
    """Return True if a projection is divided by its inputs, False if by its outputs."""
    return projection in _BY_INPUT


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that process ``index`` of ``count`` holds."""

    index: int
    count: int

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """Return the config of this process's part: its heads, its share of the inner size.

        Raises:
            UnsupportedModel: the model cannot be divided among ``count`` processes.
        """
        if self.count == 1:
            return config
        inner = config.intermediate_size
        for what, size, unit in (
            ("attention heads", config.num_heads, 1),
            ("key and value heads", config.num_kv_heads, 1),
            ("inner size", inner, BLOCK),
        ):
            if size % (self.count * unit):
                parts = f"parts of {unit}" if unit > 1 else "equal parts"
                raise UnsupportedModel(
                    f"the base's {size} {what} cannot be divided into {parts} for "
                    f"{self.count} processes: start it with a lower --tensor-parallel",
                    metadata={"what": what, "size": str(size), "processes": str(self.count)},
                )
        return replace(
            config,
            num_heads=config.num_heads // self.count,
            num_kv_heads=config.num_kv_heads // self.count,
            intermediate_size=inner // self.count,
        )

    def part(self, size: int) -> slice:
        """This process's range of ``size`` features."""
        each = size // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def outputs(self, projection: Projection, size: int) -> slice:
        """This process's range of the ``size`` outputs of a projection."""
        return slice(0, size) if divided_inputs(projection) else self.part(size)

    def inputs(self, projection: Projection, size: int) -> slice:
        """This process's range of the ``size`` inputs of a projection."""
        return self.part(size) if divided_inputs(projection) else slice(0, size)
