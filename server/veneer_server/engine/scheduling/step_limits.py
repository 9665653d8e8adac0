"""The scheduler's settings: what a step may compute, and how long a sequence may wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP_SECONDS: Final = 5.0
"""Prompt tokens may extend a step to this duration at most, as estimated by `StepCost`."""
SMALLEST_CHUNK: Final = 16
"""A step takes at least this many prompt tokens even then: smaller chunks would take longer in
total, since each step reads all weights."""

SEVERAL_S: Final = 5.0
"""A caller counts for this many seconds after its last sequence, see
`Scheduler._several_callers`."""

FIXED_CHUNK = 128
"""Prompt tokens of one sequence in a step: in exact mode exactly this many, except in the last
chunk; otherwise at most this many if their log-probabilities are requested, since each costs
a row of logits."""


SCORED_WORK: Final = 2.0
"""For a prompt token that gets a log-probability, each parameter of the model's head counts as
this many parameters of the base: its row of logits is computed, then read for a softmax.
Measured on the bundled base, whose head has a fifth of its parameters: a scored token took 1.3
to 1.4 times as much CPU time (AMD EPYC, Zen 3, AVX2)."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds that the parts of a step take, measured before serving (`step_cost.measure`).

    Attributes:
        step_s: time of a step with one token.
        token_s: time of each further token in the step.
        attention_s: time of one token's attention to one earlier token.
        sampled_s: (rows, seconds) of steps that sample from each of their rows; empty if that
            was not measured.
    """

    step_s: float
    token_s: float
    attention_s: float
    sampled_s: tuple[tuple[int, float], ...] = ()

    @property
    def prefill_beside_decode_s(self) -> float:
        """Default of `SchedulerLimits.prefill_beside_decode_s`: as long as four steps, so that
        a long prompt takes at most a quarter more time for being computed in pieces; at most
        0.2 s."""
        return min(0.2, 4 * self.step_s)

    def row_s(self, context: int, work: float = 1.0) -> float:
        """Seconds for one more token, after ``context`` others; ``work``: see `token_work`."""
        return self.token_s * work + self.attention_s * context

    def prompt_s(self, decoding: int, context: int) -> float:
        """Seconds of `STEP_SECONDS` left for prompt tokens beside ``decoding`` sequences
        whose contexts add up to ``context`` tokens."""
        return STEP_SECONDS - self.step_s - decoding * self.token_s - context * self.attention_s

    def chunk(
        self,
        seconds: float,
        context: int,
        least: int = SMALLEST_CHUNK,
        work: float = 1.0,
    ) -> int:
        """Number of prompt tokens, each after ``context`` others, that can be computed in
        ``seconds``; at least ``least``."""
        row_s = self.row_s(context, work)
        return max(least, int(seconds / row_s) if row_s > 0 else 1 << 30)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Attributes:
    max_batch_tokens: most tokens computed in one step; at least ``max_running``.
    max_running: most sequences running at once.
    context_length: tokens of the longest sequence.
    prefill_beside_decode: of `max_batch_tokens`, the most that prefill may use in a
        step that also decodes, and a quarter more if that finishes a prompt; at least 1.
    prefill_beside_decode_s: seconds by which prefill may extend such a step, as estimated by
        `cost`, and a quarter more if that finishes a prompt; 0 sets no such limit. While
        several callers use the server, a step that does not decode is limited in time, too.
    patience: seconds that the first blocked want may lack room for its adapter before
        others are held back, see `Admission`.
    max_wait: seconds that a ready sequence may wait before each other adapter of its tenant
        may start at most one more sequence ahead of it, see `Admission`.
    planned_adapters: how many of the adapters that waiting sequences use are planned at once,
        those of the oldest first: planning each takes time, and few are loaded at a time.
    exact: chunks depend only on position and prompt length, not on the rest of the
        batch: `FIXED_CHUNK` prompt tokens, then one token per step, even when generated
        tokens are recomputed. A step may then exceed its token limits by one chunk.
    cost: measured cost of a step; None if a step may take any time. Unless `exact`, it
        further limits the prompt tokens of a step.
    score_work: extra work of a prompt token whose log-probability is requested, in tokens.
    base_parameters: number of parameters of the base. With it, a token under a large adapter
        counts for several in the limits above, unless `exact`. 0 counts all tokens alike.
    """

    max_batch_tokens: int
    max_running: int
    context_length: int
    prefill_beside_decode: int = 256
    prefill_beside_decode_s: float = 0.0
    patience: float = 0.5
    max_wait: float = 1.0
    planned_adapters: int = 256
    exact: bool = False
    cost: StepCost | None = None
    score_work: float = 0.0
    base_parameters: int = 0

    @property
    def chunk(self) -> int:
        """Most tokens of one sequence in a step."""
        return FIXED_CHUNK if self.exact else self.max_batch_tokens

    @property
    def prompt_tokens(self) -> int:
        """Most prompt tokens of a step without decode, at the start of a prompt."""
        return self._affordable(self.max_batch_tokens, 0)

    @property
    def prompt_tokens_beside_decode(self) -> int:
        """Most prompt tokens of a step that decodes `max_running` sequences."""
        return self._affordable(self.prefill_beside_decode, self.max_running)

    def prompt_s(
        self, decoding: int, context: int, adapters: float = 0.0, *, shared: bool = False
    ) -> tuple[float, float]:
        """Seconds that prompt tokens may take in a step beside ``decoding`` sequences, and how
        many more if that finishes a prompt.

        Args:
            context: sum of those sequences' context lengths, in tokens.
            adapters: extra work of their large adapters, in tokens of the base (`token_work`).
            shared: whether several callers use the server, so that a step without decode is
                limited in the same way.
        """
        assert self.cost is not None
        adapters_s = adapters * self.cost.token_s
        left = self.cost.prompt_s(decoding, context) - adapters_s
        most = self.prefill_beside_decode_s
        if not (decoding or shared) or not most:
            return left, 0.0
        # At least half is for prompts, however large the adapters of streams are.
        seconds = min(left, max(most - adapters_s, most / 2))
        return seconds, max(0.0, min(seconds / 4, left - seconds))

    def _affordable(self, wanted: int, decoding: int) -> int:
        if self.cost is None or self.exact:
            return wanted
        return min(wanted, self.cost.chunk(self.prompt_s(decoding, 0)[0], 0))

    def longest_step_s(self, kv_tokens: int) -> float:
        """Estimated seconds of the longest step that can be planned.

        Args:
            kv_tokens: capacity of the KV cache.
        """
        cost = self.cost
        if cost is None:
            return 0.0
        longest = min(self.context_length, kv_tokens)
        decode = self.max_running * cost.token_s + kv_tokens * cost.attention_s
        if self.exact:  # each sequence gets its own backend call
            prompts = (self.max_batch_tokens + FIXED_CHUNK) * cost.row_s(longest)
            return (self.max_running + 1) * cost.step_s + decode + prompts
        whole = cost.step_s + self.max_batch_tokens * cost.row_s(longest)
        least = cost.step_s + decode + SMALLEST_CHUNK * cost.row_s(longest)
        return max(min(whole, STEP_SECONDS), least)
