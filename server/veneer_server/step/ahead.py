"""The interface of a backend that accepts a step before the last one's tokens are read.

Such a backend samples tokens itself and keeps them for the next step. For rows whose logits the
host must adjust first, it hands the logits to the host instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from veneer_server.step.arrays import Backend, StepArrays
from veneer_server.step.choice import TokenChoice


@dataclass(frozen=True, slots=True)
class Submitted:
    """An enqueued step.

    Attributes:
        turn: index of its set of inputs and results.
        tops: see `AheadBackend.submit`.
        handed: number of rows of logits that the host gets.
    """

    turn: int
    tops: tuple[int, ...]
    handed: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results of a step for each row of its logits.

    Attributes:
        tokens: sampled tokens; None for a row from which nothing could be sampled.
        finite: whether all logits of the row are finite.
        logprobs: log-probabilities (natural) of the tokens, or of those in ``scored``.
        tops: the likeliest tokens with their log-probabilities, as many as requested.
        handed: logits for the host, [rows, vocab] float32 in host memory; the step after the
            next overwrites them.
    """

    tokens: list[int | None]
    finite: list[bool]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    handed: torch.Tensor


class AheadBackend(Backend, Protocol):
    """A backend that enqueues steps.

    It needs no `clear`: no kernel reads a place of a KV block before a step of the same
    sequence has written to it.
    """

    @property
    def last_logits(self) -> torch.Tensor:
        """Logits [rows, vocab] of the last step, on the device."""

    def submit(
        self,
        step: StepArrays,
        choices: Sequence[TokenChoice],
        tops: Sequence[int],
        carried: Sequence[int] = (),
        handed: Sequence[int] = (),
        scored: Sequence[int] = (),
    ) -> Submitted:
        """Enqueue a step and the sampling of a token for each row of its logits. Does not block
        unless the step before the last is still running.

        Args:
            choices: for each row of logits, without bias, penalties and masks.
            tops: for each row of logits, how many of the likeliest tokens are wanted.
            carried: for each row of the step, the row of the last step's logits whose token is
                its input, or -1. So a step may be submitted before the last one's tokens are
                read.
            handed: rows of logits that the host gets.
            scored: for each row of logits, the token whose log-probability is wanted, or -1 for
                the sampled one; empty if all are -1.
        """

    def read(self, submitted: Submitted) -> Sampled:
        """Wait for a step and return its results. Call this once, before the step after the
        next is submitted."""
