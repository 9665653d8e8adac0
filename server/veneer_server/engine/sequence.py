"""One request inside the engine, and the step as plain data. No torch.

A `Sequence` is mutable and belongs to the step loop alone. A `StepPlan` is
frozen: it is all that a model runner may know of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from veneer_server.engine.history import History, Seen
from veneer_server.engine.messages import (
    AdapterSource,
    Constraint,
    SamplingParams,
    Submit,
    TierName,
    Tops,
)

__all__ = [
    "ConstraintFailure",
    "Finish",
    "Following",
    "PlannedSequence",
    "Sequence",
    "SequenceState",
    "StepPlan",
    "StepResult",
    "plan_sequence",
]


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Finish(Enum):
    """Why a sequence ended; the values are those of the wire."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Following(Enum):
    """How a constrained sequence goes on."""

    GOES_ON = "goes on"
    COMPLETE = "complete"
    """Its constraint admits nothing more."""
    LATE = "late"
    """What may come next is not known yet: it is left out of steps until it is."""


@dataclass(frozen=True, slots=True)
class ConstraintFailure:
    """Why a constraint cannot be followed: a phrase, and the limit that was passed, if any."""

    limit: str
    problem: str


@dataclass(slots=True, eq=False)
class Sequence:
    """A request from submission to its end.

    Attributes:
        request: what was asked.
        arrived: monotonic seconds.
        found_in: tier of its adapter at submission; None for the base model.
        tokens: prompt, then generated tokens.
        computed: leading tokens whose K and V are in the cache.
        blocks: its KV blocks, in order; full ones may be shared.
        block_keys: prefix cache keys of its leading blocks, as far as they were needed.
        published: leading blocks that others may find.
        cached_tokens: prompt tokens that it found in the prefix cache when it first started.
        prompt_logprobs: filled chunk by chunk during prefill, if asked for.
        load_seconds: time spent waiting for the adapter.
        waiting_since: when it last began to wait for the adapter, if it does.
        admitted: monotonic seconds of its first step.
        history: what penalties are of, from the first token that takes any.
    """

    request: Submit
    arrived: float
    found_in: TierName | None
    state: SequenceState = SequenceState.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    published: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[Tops] = field(default_factory=list)
    load_seconds: float = 0.0
    waiting_since: float | None = None
    admitted: float | None = None
    history: History | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def id(self) -> int:
        return self.request.sequence

    @property
    def adapter(self) -> AdapterSource | None:
        return self.request.adapter

    @property
    def digest(self) -> str | None:
        """Weights digest of its adapter, or None for the base model."""
        return self.request.adapter.weights_digest if self.request.adapter else None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def scores_prompt(self) -> bool:
        """The prompt's log-probabilities are wanted and were not reported yet."""
        return self.request.prompt_logprobs and not self.generated

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def seen(self) -> Seen:
        """The different tokens so far; costs what was appended since the last call."""
        if self.history is None:
            self.history = History(self.request.prompt)
        self.history.add(self.tokens[self.prompt_length + self.history.generated :])
        return self.history.seen()


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A sequence's part of one step.

    Attributes:
        sequence: its id.
        digest: weights digest of its adapter, or None.
        tokens: token ids to compute, at positions ``start`` and on.
        start: tokens already in the KV cache.
        blocks: its KV blocks, enough for ``start + len(tokens)`` tokens.
        samples: True if the last token's logits give a new token; False for a
            prefill chunk that does not reach the end of the prompt.
        score: for each of `tokens`, the token that follows it, when the prompt's
            log-probabilities are wanted; else empty.
        logprobs: whether the sampled token's log-probability is wanted.
        sampling: how to choose the new token.
        position: index of the token to be sampled; with the seed it names one
            random number, so a token does not depend on who shares the batch.
        top_logprobs: most likely tokens wanted beside each log-probability.
        history: the tokens so far, where one is sampled and that takes them.
        constraint: what the output must be; its state is the runner's.
    """

    sequence: int
    digest: str | None
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    samples: bool
    score: tuple[int, ...]
    logprobs: bool
    sampling: SamplingParams
    position: int
    top_logprobs: int = 0
    history: Seen | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `sequences` is sorted by adapter, those without one first, so that
    rows that share an adapter are neighbours."""

    sequences: tuple[PlannedSequence, ...]

    @property
    def rows(self) -> int:
        """Tokens computed by the step."""
        return sum(len(s.tokens) for s in self.sequences)

    @property
    def prefill_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences if len(s.tokens) > 1)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Different adapters of the step, in row order."""
        return tuple(dict.fromkeys(s.digest for s in self.sequences if s.digest is not None))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a model runner returns, aligned with ``StepPlan.sequences``.

    Attributes:
        tokens: sampled token, or None where the plan said ``samples=False`` or
            the logits were not finite.
        logprobs: raw log-probability of each sampled token where wanted.
        scores: for each sequence the log-probabilities of ``score``.
        finite: False for a sequence whose logits had NaN or infinity.
        tops: for each sequence the most likely tokens beside its sampled one.
        score_tops: the same for each of ``scores``.
        following: how each constrained sequence goes on; GOES_ON for others. COMPLETE or
            LATE without a token: so it stood before this step, whose logits are not used.
        failures: why a sequence's constraint could not be followed, or None; it ends.
    """

    tokens: tuple[int | None, ...]
    logprobs: tuple[float | None, ...]
    scores: tuple[tuple[float, ...], ...]
    finite: tuple[bool, ...]
    tops: tuple[Tops | None, ...] = ()
    score_tops: tuple[tuple[Tops, ...], ...] = ()
    following: tuple[Following, ...] = ()
    failures: tuple[ConstraintFailure | None, ...] = ()


def plan_sequence(sequence: Sequence, count: int) -> PlannedSequence:
    """The part of ``sequence`` in a step that computes its next ``count`` tokens."""
    start, end = sequence.computed, sequence.computed + count
    score: tuple[int, ...] = ()
    if sequence.scores_prompt:
        # The token after each computed one; the last prompt token has none.
        score = tuple(sequence.tokens[start + 1 : min(end + 1, sequence.prompt_length)])
    samples = end == len(sequence.tokens)
    return PlannedSequence(
        sequence=sequence.id,
        digest=sequence.digest,
        tokens=tuple(sequence.tokens[start:end]),
        start=start,
        blocks=tuple(sequence.blocks),
        samples=samples,
        score=score,
        logprobs=sequence.request.logprobs,
        sampling=sequence.request.sampling,
        position=len(sequence.tokens),
        top_logprobs=sequence.request.top_logprobs,
        history=(
            sequence.seen() if samples and sequence.request.sampling.needs_history else None
        ),
        constraint=sequence.request.constraint,
    )
