"""The choice of a row's token, and the part of it that a backend may take over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.step.token_counts import Seen
from veneer_server.wire.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """How to choose one row's token.

    Attributes:
        position: index of the new token.
        token_counts: the tokens so far, if `params` needs them.
        allowed: [vocab] bool with at least one True, or None if every token is allowed.
        forbidden: token ids that may not be chosen; some other token is allowed.
    """

    params: SamplingParams
    position: int
    token_counts: Seen | None = None
    allowed: NDArray[np.bool_] | None = None
    forbidden: tuple[int, ...] = ()


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for a position of a request (Philox, counter mode)."""
    stream = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(stream).random())


class Draws(Protocol):
    """Samples tokens from adjusted logits."""

    def tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[int | None]:
        """See `sample`; bias, penalties and masks are already in the logits."""

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows] float32: log(sum of e^logit)."""
