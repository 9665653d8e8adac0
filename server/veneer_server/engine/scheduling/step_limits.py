"""What a step may compute and how long anyone may wait: the scheduler's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FIXED_CHUNK", "SMALLEST_CHUNK", "STEP_SECONDS", "SchedulerLimits", "StepCost"]

STEP_SECONDS: Final = 5.0
"""A step takes prompt tokens for so long at most, by what was measured; see `StepCost`."""
SMALLEST_CHUNK: Final = 16
"""But at least so many: smaller chunks would take longer altogether, since each reads all
weights."""

FIXED_CHUNK = 128
"""Prompt tokens of one sequence in a step: the most where their log-probabilities
are wanted, since each costs a row of logits, and always (but for the last chunk)
in exact mode."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds that parts of a step take, as measured before serving (`step_cost.measure`).

    Attributes:
        step_s: a step of one token.
        token_s: each further token of it.
        attention_s: one token's attention to one token before it.
    """

    step_s: float
    token_s: float
    attention_s: float

    def row_s(self, context: int) -> float:
        """One more token, which has so many before it."""
        return self.token_s + self.attention_s * context

    def prompt_s(self, decoding: int, context: int) -> float:
        """What is left of `STEP_SECONDS` for prompt tokens beside so many that decode, with
        so many tokens before them altogether."""
        return STEP_SECONDS - self.step_s - decoding * self.token_s - context * self.attention_s

    def chunk(self, seconds: float, context: int, least: int = SMALLEST_CHUNK) -> int:
        """Tokens of a prompt that may be computed in that time with so many before each, or
        ``least`` if those are more."""
        row_s = self.row_s(context)
        return max(least, int(seconds / row_s) if row_s > 0 else 1 << 30)


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
    cost: of a step here; None where a step may take any time. Without `exact` it bounds
        the prompt tokens of a step further.
    """

    max_batch_tokens: int
    max_running: int
    context_length: int
    prefill_beside_decode: int = 256
    patience: float = 0.5
    max_wait: float = 1.0
    exact: bool = False
    cost: StepCost | None = None

    @property
    def prompt_tokens(self) -> int:
        """Most prompt tokens of a step that does not decode, at the beginning of a prompt."""
        return self._affordable(self.max_batch_tokens, 0)

    @property
    def prompt_tokens_beside_decode(self) -> int:
        """The same of a step that decodes for all that may run."""
        return self._affordable(self.prefill_beside_decode, self.max_running)

    def _affordable(self, wanted: int, decoding: int) -> int:
        if self.cost is None or self.exact:
            return wanted
        return min(wanted, self.cost.chunk(self.cost.prompt_s(decoding, 0), 0))

    def longest_step_s(self, kv_tokens: int) -> float:
        """Seconds that the longest step which may be planned takes by what was measured.

        Args:
            kv_tokens: that the KV cache holds in all.
        """
        cost = self.cost
        if cost is None:
            return 0.0
        longest = min(self.context_length, kv_tokens)
        decode = self.max_running * cost.token_s + kv_tokens * cost.attention_s
        if self.exact:  # each sequence is a step of its own
            prompts = (self.max_batch_tokens + FIXED_CHUNK) * cost.row_s(longest)
            return (self.max_running + 1) * cost.step_s + decode + prompts
        whole = cost.step_s + self.max_batch_tokens * cost.row_s(longest)
        least = cost.step_s + decode + SMALLEST_CHUNK * cost.row_s(longest)
        return max(min(whole, STEP_SECONDS), least)
