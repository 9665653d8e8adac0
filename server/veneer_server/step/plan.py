"""A step as plain data: the plan, and the results. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

from veneer_server.step.token_counts import Seen
from veneer_server.wire.messages import (
    Constraint,
    SamplingParams,
    Tops,
)


class ConstraintState(Enum):
    """How a constrained sequence continues."""

    GOES_ON = "goes on"
    COMPLETE = "complete"
    """Its constraint allows no further token."""
    LATE = "late"
    """Its next allowed tokens are not known yet; until then it is left out of steps."""


@dataclass(frozen=True, slots=True)
class ConstraintFailure:
    """Why a constraint cannot be followed: a phrase, and the limit it exceeded, if any."""

    limit: str
    problem: str


@dataclass(slots=True)
class PlannedSequence:
    """A sequence's part of one step. Read-only; not frozen, since a frozen one takes three
    times as long to make.

    Attributes:
        sequence: its id.
        digest: weights digest of its adapter, or None.
        tokens: token ids to compute, from position ``start`` on.
        start: tokens already in the KV cache.
        blocks: its KV blocks, enough for ``start + len(tokens)`` tokens; 0 for blocks that no
            layer's window reaches.
        samples: True if the last token's logits give a new token; False for a
            prefill chunk that does not reach the end of the prompt.
        score: for each of `tokens`, the token that follows it, if the prompt's
            log-probabilities are requested; otherwise empty.
        ranks: whether the ranks of the tokens in `score` are requested.
        logprobs: whether the sampled token's log-probability is requested.
        sampling: how to choose the new token.
        position: index of the token to be sampled; with the seed it determines the
            random number, so that a token does not depend on the rest of the batch.
        top_logprobs: how many most likely tokens to report beside each log-probability.
        token_counts: the tokens so far, if a token is sampled with penalties.
        constraint: constraint on the output; the runner has its state.
        forbidden: tokens that would end the sequence too early.
        carries: whether the last of `tokens` is the token that the previous step samples. It
            is not read yet, so a 0 stands for it.
        draft: the last of `tokens`, if they are a guess: a token is sampled after each of them
            too, as long as the tokens sampled before it equal the draft, see
            `engine.scheduling.speculation`. Only with a backend whose rows do not depend on the
            rows beside them.
        work: relative cost of each of `tokens`, see `token_work`.
    """

    sequence: int
    digest: str | None
    tokens: tuple[int, ...]
    start: int
    blocks: array[int]
    samples: bool
    score: tuple[int, ...]
    logprobs: bool
    sampling: SamplingParams
    position: int
    top_logprobs: int = 0
    ranks: bool = False
    token_counts: Seen | None = None
    constraint: Constraint | None = None
    forbidden: tuple[int, ...] = ()
    carries: bool = False
    work: float = 1.0
    draft: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Number of `tokens` before the draft."""
        return len(self.tokens) - len(self.draft)

    @property
    def unadjusted(self) -> bool:
        """Whether its token is sampled from the unadjusted logits. A bias, penalty or mask
        would need the host to know the tokens before it."""
        return not (
            self.constraint is not None
            or self.forbidden
            or self.sampling.needs_token_counts
            or self.sampling.logit_bias
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `sequences` is sorted by adapter, those without one first, so that
    rows that share an adapter are adjacent."""

    sequences: tuple[PlannedSequence, ...]

    @property
    def rows(self) -> int:
        """Tokens computed by the step."""
        return sum(len(s.tokens) for s in self.sequences)

    @property
    def prefill_tokens(self) -> int:
        return sum(s.known for s in self.sequences if s.known > 1)

    @property
    def draft_tokens(self) -> int:
        """Rows of drafts."""
        return sum(len(s.draft) for s in self.sequences)

    @property
    def extra_work(self) -> tuple[float, float]:
        """Extra cost due to the size of adapters, in tokens: of prefill, and of decode."""
        prefill = decode = 0.0
        for planned in self.sequences:
            if planned.work > 1.0:
                if (count := planned.known) > 1:
                    prefill += count * (planned.work - 1.0)
                else:
                    decode += planned.work - 1.0
        return prefill, decode

    @property
    def adapters(self) -> tuple[str, ...]:
        """Distinct adapters of the step, in row order."""
        return tuple(dict.fromkeys(s.digest for s in self.sequences if s.digest is not None))

    @property
    def mixed(self) -> bool:
        """Whether the step has rows of several adapters, or of an adapter and the base."""
        return self.sequences[0].digest != self.sequences[-1].digest

    @property
    def scores(self) -> bool:
        """Whether a prompt's log-probabilities are requested."""
        return any(s.score for s in self.sequences)


@dataclass(slots=True)
class FurtherToken:
    """A token sampled after a token of the draft that was accepted; the fields are those of
    `SequenceResult`."""

    token: int
    logprob: float | None = None
    tops: Tops | None = None


@dataclass(slots=True)
class SequenceResult:
    """A step's result for one sequence; filled in by the runner, and read-only afterwards.

    Attributes:
        token: the sampled token, or None if the plan has ``samples=False``, the logits were not
            finite, or the constraint allowed none.
        finite: False if its logits had NaN or infinity, or nothing could be sampled from
            them.
        logprob: raw log-probability of ``token``, if requested.
        tops: the most likely tokens at the same position, if requested.
        scores: log-probabilities of `PlannedSequence.score`.
        score_tops: the most likely tokens at each of these positions.
        score_ranks: how many tokens are at least as likely as each of these, if requested.
        following: how a constrained sequence continues. COMPLETE or LATE without a token is
            the state before this step, and the step's logits are not used.
        failure: why the constraint could not be followed; the sequence ends.
        further: the tokens after ``token``, as many as tokens of the draft were accepted.
        redo: whether a row of a draft was not finite. Its K and V could reach the rows before
            it, so nothing of the sequence's part counts, and it has to be computed without a
            draft.
    """

    token: int | None = None
    finite: bool = True
    logprob: float | None = None
    tops: Tops | None = None
    scores: tuple[float, ...] = ()
    score_tops: tuple[Tops, ...] = ()
    score_ranks: tuple[int, ...] = ()
    following: ConstraintState = ConstraintState.GOES_ON
    failure: ConstraintFailure | None = None
    further: list[FurtherToken] = field(default_factory=list)
    redo: bool = False


class Runner(Protocol):
    """Executes a step (`ModelRunner`; a deterministic fake in tests)."""

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        """One result for each of the plan's sequences, in its order."""


@runtime_checkable
class AheadRunner(Runner, Protocol):
    """A runner that accepts a step before the last one's results are read, so that the device
    keeps working while the host reads and plans."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step and return before it is done. At most one other step may be unread then,
        and its plan must not have `StepPlan.scores`."""

    def read(self) -> tuple[SequenceResult, ...]:
        """Wait for the earliest unread step; return its results as `execute` does."""
