"""The prompt tokens of a step: how many it may take, and how many each prompt gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.step_limits import (
    FIXED_CHUNK,
    SMALLEST_CHUNK,
    SchedulerLimits,
    StepCost,
)
from veneer_server.step.plan import PlannedSequence

__all__ = ["PrefillRoom"]


@dataclass(slots=True)
class PrefillRoom:
    """Prompt tokens that a step may still take.

    Attributes:
        left: tokens still available.
        exact: whether chunks are those of exact mode, see `SchedulerLimits`.
        crumb: extra tokens allowed if they finish a prompt: its leftover tokens would cost
            every stream another step with prefill.
        cost: measured cost of a step; None if steps may take any time.
        seconds: time left for prompt tokens.
        given: tokens handed out; `SMALLEST_CHUNK` are, however long they take, or prompts
            would never finish.
    """

    left: int
    exact: bool
    crumb: int = 0
    cost: StepCost | None = None
    seconds: float = 0.0
    given: int = 0

    @classmethod
    def beside(
        cls, decoding: Mapping[int, PlannedSequence], limits: SchedulerLimits
    ) -> PrefillRoom:
        """What is available in a step that decodes ``decoding``."""
        left, crumb = limits.max_batch_tokens - len(decoding), 0
        beside = limits.prefill_beside_decode
        if decoding and left > beside:
            crumb = 0 if limits.exact else min(beside // 4, left - beside)
            left = beside
        if limits.cost is None or limits.exact:
            return cls(left, limits.exact, crumb)
        context = sum(planned.start for planned in decoding.values())
        seconds = limits.cost.prompt_s(len(decoding), context)
        return cls(left, limits.exact, crumb, limits.cost, seconds)

    def chunk(self, sequence: Sequence) -> int:
        """Tokens of this prefill to compute in the step; 0 if no room is left."""
        if self.left + self.crumb <= 0:
            return 0
        if self.exact:
            of_prompt = sequence.prompt_length - sequence.begun
            return min(FIXED_CHUNK, of_prompt) if of_prompt > 0 else 1
        whole = sequence.remaining <= self.left + self.crumb
        count = min(sequence.remaining if whole else max(0, self.left), self._most(sequence))
        return min(count, FIXED_CHUNK) if sequence.scores_prompt else count

    def _most(self, sequence: Sequence) -> int:
        """Most tokens of a prompt that fit into the time left."""
        if self.cost is None:
            return sequence.remaining
        # Assumes the longest context for every token.
        context = min(sequence.length, sequence.begun + max(1, self.left))
        return self.cost.chunk(self.seconds, context, max(0, SMALLEST_CHUNK - self.given))

    def take(self, count: int, remaining: int, context: int) -> None:
        """Give ``count`` tokens to a prompt that had ``remaining`` left to compute, after
        ``context`` computed ones."""
        self.left -= count
        self.given += count
        if self.cost is not None:
            self.seconds -= count * self.cost.row_s(context + count)
        if count < remaining:
            self.crumb = 0  # otherwise a younger prompt would finish first
