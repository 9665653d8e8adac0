"""The seam of a backend that takes a step before the last one's tokens are read.

Such a backend samples tokens itself, where the next step finds them. What it cannot sample, for
the host must adjust the logits first, it hands over as logits.
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
    """A step that is enqueued.

    Attributes:
        turn: its set of inputs and results.
        tops: see `AheadBackend.submit`.
        handed: rows of logits that the host gets.
    """

    turn: int
    tops: tuple[int, ...]
    handed: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step gave for each row of its logits.

    Attributes:
        tokens: None where nothing could be sampled.
        finite: whether all of a row's logits are.
        logprobs: natural logarithm, of the tokens, or of those of ``scored``.
        tops: the likeliest tokens with theirs, as many as were asked for.
        handed: [rows, vocab] float32 in host memory, which the step after the next overwrites.
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
        """[rows, vocab] of the last step, on the device."""

    def submit(
        self,
        step: StepArrays,
        choices: Sequence[TokenChoice],
        tops: Sequence[int],
        carried: Sequence[int] = (),
        handed: Sequence[int] = (),
        scored: Sequence[int] = (),
    ) -> Submitted:
        """Enqueue a step and the sampling of a token for each row of its logits. The host waits
        for nothing, unless the step before the last is still running.

        Args:
            choices: for each row of logits, without bias, penalties and masks.
            tops: for each row of logits, how many of the likeliest tokens are wanted.
            carried: for each row of the step the row of the last step's logits whose token it
                has, or -1. So a step may be submitted before the last one's tokens are read.
            handed: rows of logits that the host gets.
            scored: for each row of logits the token whose log-probability is wanted, or -1 for
                the sampled one; empty for all of these.
        """

    def read(self, submitted: Submitted) -> Sampled:
        """Wait for a step, and return what it gave. Once, before the step after the next is
        submitted."""
