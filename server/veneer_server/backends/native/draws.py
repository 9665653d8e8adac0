"""Samples tokens from logits with the kernels (``cpp/kernels/sample.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from veneer_server.backends.native.library import Library, SampleRow, address
from veneer_server.step.choice import TokenChoice
from veneer_server.wire.messages import SamplingParams

_SAME: Final = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if hasattr(SampleRow, name) and name != "seed"  # the seed is truncated to 64 bits
)
"""Options that are passed to the kernels unchanged."""
_IN_LOGITS: Final = frozenset(
    {"repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"}
)
"""Options that have already been applied to the logits."""
assert {*_SAME, "seed", *_IN_LOGITS} == {*SamplingParams.__struct_fields__}, (
    "an option that the kernels do not have would be ignored"
)


class NativeDraws:
    """Implements `step.choice.Draws`.

    Args:
        engine: handle from `Library.create`; that engine's threads share the rows. None uses
            the calling thread. May be changed later.
    """

    def __init__(self, library: Library, engine: int | None = None) -> None:
        self._library = library
        self.engine = engine

    def tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[int | None]:
        """See `Draws.tokens`."""
        logits = logits.contiguous()
        start, row = logits.data_ptr(), logits.stride(0) * logits.itemsize
        draws = (SampleRow * len(choices))()
        for i, (draw, choice) in enumerate(zip(draws, choices, strict=True)):
            params = choice.params
            draw.logits = start + i * row
            draw.seed = params.seed & (2**64 - 1)
            draw.position = choice.position
            for name in _SAME:
                setattr(draw, name, getattr(params, name))
        self._library.sample(self.engine, draws, logits.shape[1])
        return [None if draw.token < 0 else draw.token for draw in draws]

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Draws.log_sums`."""
        logits = logits.contiguous()
        sums = torch.empty(len(logits))
        self._library.log_sums(self.engine, address(logits), logits.shape, address(sums))
        return sums
