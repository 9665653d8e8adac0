"""What a step may compute and how long anyone may wait: the scheduler's settings."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIXED_CHUNK", "SchedulerLimits"]

FIXED_CHUNK = 128
"""Prompt tokens of one sequence in a step: the most where their log-probabilities
are wanted, since each costs a row of logits, and always (but for the last chunk)
in exact mode."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Attributes:
    max_batch_tokens: tokens computed in one step; at least ``max_running``.
    max_running: sequences running at once.
    context_length: longest sequence.
    prefill_beside_decode: of `max_batch_tokens`, the most that prefill may use in a
        step that also decodes, and a quarter more where that ends a prompt; at least 1.
    patience: seconds that the first want may find no room for its adapter before
        others are held back, see `Admission`.
    max_wait: seconds after which nothing younger starts before a sequence that could.
    exact: chunks depend on position and prompt length alone, not on what shares the
        step: `FIXED_CHUNK` prompt tokens, then one token a step, also where
        generated tokens are computed again. A step may then pass its token limits
        by one chunk.
    """

    max_batch_tokens: int
    max_running: int
    context_length: int
    prefill_beside_decode: int = 256
    patience: float = 0.5
    max_wait: float = 1.0
    exact: bool = False
