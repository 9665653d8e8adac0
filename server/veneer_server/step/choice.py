"""How a row's token is chosen, and what a backend may do of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.step.token_counts import Seen
from veneer_server.wire.messages import SamplingParams

__all__ = [
    "Choice",
    "Draws",
]


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose one row's token.

    Attributes:
        position: index of the new token.
        token_counts: the tokens so far, where `params` needs them.
        allowed: [vocab] bool, or None where every token is allowed; at least one is.
    """

    params: SamplingParams
    position: int
    token_counts: Seen | None = None
    allowed: NDArray[np.bool_] | None = None


class Draws(Protocol):
    """From adjusted logits to tokens."""

    def tokens(self, logits: torch.Tensor, choices: Sequence[Choice]) -> list[int | None]:
        """See `sample`; bias, penalties and masks are in the logits already."""

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows] float32: log(sum of e^logit)."""
