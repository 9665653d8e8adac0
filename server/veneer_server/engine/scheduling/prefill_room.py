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
    """Prompt tokens that a step may still take. Those under a large adapter count for several
    (`Sequence.work`).

    Attributes:
        left: tokens still available, under no adapter.
        exact: whether chunks are those of exact mode, see `SchedulerLimits`.
        crumb: extra tokens allowed if they finish a prompt: its leftover tokens would cost
            every stream another step with prefill.
        cost: measured cost of a step; None if steps may take any time.
        seconds: time left for prompt tokens.
        given: tokens handed out, each counted by its work; `SMALLEST_CHUNK` are, however long
            they take, or prompts would never finish.
    """

    left: float
    exact: bool
    crumb: int = 0
    cost: StepCost | None = None
    seconds: float = 0.0
    given: float = 0.0

    @classmethod
    def beside(
        cls, decoding: Mapping[int, PlannedSequence], limits: SchedulerLimits
    ) -> PrefillRoom:
        """What is available in a step that decodes ``decoding``."""
        left: float = limits.max_batch_tokens - len(decoding)
        crumb, beside = 0, limits.prefill_beside_decode
        if decoding and left > beside:
            crumb = 0 if limits.exact else min(beside // 4, int(left) - beside)
            left = beside
        if limits.exact:
            return cls(left, limits.exact, crumb)
        # Half at least is for prompts, however large the adapters of streams are.
        extra = sum(planned.work - 1.0 for planned in decoding.values())
        left = max(left - extra, min(left, beside / 2))
        if limits.cost is None:
            return cls(left, limits.exact, crumb)
        context = sum(planned.start for planned in decoding.values())
        seconds = limits.cost.prompt_s(len(decoding), context) - extra * limits.cost.token_s
        return cls(left, limits.exact, crumb, limits.cost, seconds)

    def chunk(self, sequence: Sequence) -> int:
        """Tokens of this prefill to compute in the step; 0 if no room is left."""
        if self.left + self.crumb <= 0:
            return 0
        if self.exact:
            of_prompt = sequence.prompt_length - sequence.begun
            return min(FIXED_CHUNK, of_prompt) if of_prompt > 0 else 1
        work = sequence.work
        whole = sequence.remaining * work <= self.left + self.crumb
        count = sequence.remaining
        if not whole:
            count = int(max(0.0, self.left) / work)
            if not count and not self.given and self.left > 0:
                count = 1  # a token that takes more than all that there is
        count = min(count, self._most(sequence))
        return min(count, FIXED_CHUNK) if sequence.scores_prompt else count

    def _most(self, sequence: Sequence) -> int:
        """Most tokens of a prompt that fit into the time left."""
        if self.cost is None:
            return sequence.remaining
        # Assumes the longest context for every token.
        context = min(sequence.length, sequence.begun + max(1, int(self.left)))
        least = max(0.0, SMALLEST_CHUNK - self.given) / sequence.work
        if least and not self.given:
            least = max(1.0, least)
        return self.cost.chunk(self.seconds, context, int(least), sequence.work)

    def take(self, count: int, remaining: int, context: int, work: float = 1.0) -> None:
        """Give ``count`` tokens to a prompt that had ``remaining`` left to compute, after
        ``context`` computed ones; ``work``: what each takes."""
        self.left -= count * work
        self.given += count * work
        if self.cost is not None:
            self.seconds -= count * self.cost.row_s(context + count, work)
        if count < remaining:
            self.crumb = 0  # otherwise a younger prompt would finish first
