"""Prefill budget of a step: the prompt tokens it may take, and how many each prompt gets."""

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


@dataclass(slots=True)
class PrefillRoom:
    """Prompt tokens that a step may still take. A token under a large adapter counts for
    several (`Sequence.work`).

    Attributes:
        left: tokens still available, counted as tokens without an adapter.
        exact: whether chunks have the sizes of exact mode, see `SchedulerLimits`.
        crumb: extra tokens allowed if they finish a prompt: otherwise its leftover tokens would
            cost every stream another step with prefill.
        cost: measured cost of a step; None if steps may take any time.
        seconds: time left for prompt tokens.
        crumb_s: extra time allowed if it finishes a prompt.
        given: tokens handed out, each counted by its work. At least `SMALLEST_CHUNK` may be
            handed out however long they take, or prompts would never finish.
    """

    left: float
    exact: bool
    crumb: int = 0
    cost: StepCost | None = None
    seconds: float = 0.0
    crumb_s: float = 0.0
    given: float = 0.0

    @classmethod
    def beside(
        cls,
        decoding: Mapping[int, PlannedSequence],
        limits: SchedulerLimits,
        *,
        shared: bool = False,
    ) -> PrefillRoom:
        """Return the room of a step that decodes ``decoding``; ``shared``: see
        `SchedulerLimits.prompt_s`."""
        left: float = limits.max_batch_tokens - len(decoding)
        crumb, beside = 0, limits.prefill_beside_decode
        if decoding and left > beside:
            crumb = 0 if limits.exact else min(beside // 4, int(left) - beside)
            left = beside
        if limits.exact:
            return cls(left, limits.exact, crumb)
        # At least half is for prompts, however large the adapters of streams are.
        extra = sum(planned.work - 1.0 for planned in decoding.values())
        left = max(left - extra, min(left, beside / 2))
        if limits.cost is None:
            return cls(left, limits.exact, crumb)
        context = sum(planned.start for planned in decoding.values())
        seconds, crumb_s = limits.prompt_s(len(decoding), context, extra, shared=shared)
        return cls(left, limits.exact, crumb, limits.cost, seconds, crumb_s)

    def chunk(self, sequence: Sequence, given: int = 0, *, part: float = 1.0) -> int:
        """Number of this prompt's tokens to compute in the step; 0 if no room is left.

        Args:
            given: tokens that the prompt has been given in this step already.
            part: fraction of the room that it may take, unless the whole room is enough to
                finish the prompt.
        """
        if self.left + self.crumb <= 0:
            return 0
        if self.exact:
            of_prompt = sequence.prompt_length - sequence.begun
            return min(FIXED_CHUNK, of_prompt) if of_prompt > 0 else 1
        work, remaining = sequence.prompt_work, sequence.remaining - given
        most = FIXED_CHUNK - given if sequence.scores_prompt else remaining
        if remaining * work <= self.left + self.crumb:
            most = min(most, self._affordable(sequence, given, self.seconds + self.crumb_s))
            if most >= remaining:
                return remaining
        count = int(max(0.0, self.left) * part / work)
        if not count and not self.given and self.left > 0:
            count = 1  # a single token that takes more than the whole room
        count = min(count, self._affordable(sequence, given, self.seconds * part))
        return max(0, min(count, most, remaining))

    def _affordable(self, sequence: Sequence, given: int, seconds: float) -> int:
        """Most tokens of a prompt that can be computed in ``seconds``."""
        if self.cost is None:
            return sequence.remaining
        work = sequence.prompt_work
        # Assumes the longest context for every token.
        begun = sequence.begun + given
        context = min(sequence.length, begun + max(1, int(self.left)))
        least = max(0.0, SMALLEST_CHUNK - self.given) / work
        if least and not self.given:
            least = max(1.0, least)
        return self.cost.chunk(seconds, context, int(least), work)

    def take(self, sequence: Sequence, count: int, given: int = 0) -> None:
        """Give ``count`` more tokens to a prompt that has been given ``given`` in this
        step."""
        work = sequence.prompt_work
        self.left -= count * work
        self.given += count * work
        if self.cost is not None:
            self.seconds -= count * self.cost.row_s(sequence.begun + given + count, work)
        if count < sequence.remaining - given:
            self.crumb = 0  # or a younger prompt would finish first
            self.crumb_s = 0.0
