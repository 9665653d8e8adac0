"""A request inside the engine, and its part of a step as plain data. No torch.

A `Sequence` is mutable and belongs to the step loop alone. A `PlannedSequence` is
frozen, and is all that a model runner sees of a sequence.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from veneer_server.engine.scheduling.fair_shares import Share
from veneer_server.step.plan import PlannedSequence
from veneer_server.step.token_counts import Seen, TokenCounts
from veneer_server.wire.messages import (
    AdapterSource,
    PackedTops,
    SequenceRequest,
    TierName,
)


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Finish(Enum):
    """Why a sequence ended; the values are those on the wire."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request from submission to its end.

    Attributes:
        id: chosen by the front process.
        request: the request as submitted.
        arrived: monotonic seconds.
        found_in: tier of its adapter at submission; None for the base model.
        tokens: prompt, then generated tokens.
        computed: leading tokens whose K and V are in the cache.
        blocks: its KV blocks, in order; full ones may be shared.
        given_back: number of leading blocks that no layer reaches any more; they are 0 in
            `blocks`.
        block_keys: prefix cache keys of its leading blocks, computed as needed.
        published: number of leading blocks that other sequences may find.
        cached_tokens: prompt tokens that it found in the prefix cache when it first started.
        prompt_logprobs: filled chunk by chunk during prefill, if requested.
        mixed: whether a step that computed some of the prompt's log-probabilities also had
            rows of another adapter or the base.
        place: its order of arrival among waiting sequences; negative once it was preempted.
        urgency: its sort key in its flow, see `WaitingSequences`.
        load_seconds: time spent waiting for the adapter; complete while it runs.
        admitted: monotonic seconds of its first step.
        token_counts: token counts for penalties; None until a token first needs them.
        ahead: tokens after the computed ones whose step is submitted, but not read yet.
        awaited: tokens that such steps sample: at most 1 when a step is planned.
        carried: whether the next step can take the last awaited token from the device.
        work: cost of each of its tokens, see `token_work`; set when it is queued.
        score_work: extra cost of a prompt token whose log-probability is requested: the
            model's head, and the softmax over the vocabulary.
        turn: number of the turn in which it last decoded, see `Scheduler._choose_in_turns`.
        sound: False once its logits were not finite.
        share: the share that its service is charged to; set when it is queued.
    """

    id: int
    request: SequenceRequest
    arrived: float
    found_in: TierName | None
    state: SequenceState = SequenceState.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("q"))
    given_back: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    published: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[PackedTops] = field(default_factory=list)
    prompt_ranks: list[int] = field(default_factory=list)
    mixed: bool = False
    place: int = 0
    urgency: tuple[float, int] = (0.0, 0)
    load_seconds: float = 0.0
    admitted: float | None = None
    token_counts: TokenCounts | None = None
    ahead: int = 0
    awaited: int = 0
    carried: bool = False
    work: float = 1.0
    score_work: float = 0.0
    turn: int = 0
    sound: bool = True
    share: Share = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

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
        """Whether log-probabilities of the prompt are requested and not yet reported."""
        return self.request.prompt_logprobs and not self.generated

    @property
    def prompt_work(self) -> float:
        """Cost of each of its prompt tokens, relative to one of the base without a score."""
        return self.work + self.score_work if self.scores_prompt else self.work

    @property
    def begun(self) -> int:
        """Leading tokens that are computed, or whose step is submitted."""
        return self.computed + self.ahead

    @property
    def length(self) -> int:
        """Number of its tokens, including one that is awaited."""
        return len(self.tokens) + self.awaited

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) + self.awaited - self.computed - self.ahead

    def may_follow(self, context: int) -> bool:
        """Whether it can be in the next step although its awaited token is not known yet: it
        certainly continues, unless that token ends it.

        Args:
            context: most tokens of a sequence.
        """
        if not self.awaited:
            return True
        goes_on = self.generated + self.awaited < self.request.max_tokens
        return self.carried and goes_on and self.length < context

    def submitted(self, planned: PlannedSequence) -> None:
        """Record that a step with this part of the sequence is submitted."""
        self.ahead += len(planned.tokens)
        if planned.samples:
            self.awaited += 1
            self.carried = planned.unadjusted

    def returned(self, planned: PlannedSequence) -> None:
        """Record that the results of a submitted step are here."""
        self.ahead -= len(planned.tokens)
        self.awaited -= planned.samples

    def seen(self) -> Seen:
        """Return the distinct tokens so far. Each call only counts the tokens appended since
        the last one."""
        if self.token_counts is None:
            self.token_counts = TokenCounts(self.request.prompt)
        self.token_counts.add(self.tokens[self.prompt_length + self.token_counts.generated :])
        return self.token_counts.seen()


def plan_sequence(
    sequence: Sequence,
    count: int,
    eos: frozenset[int] = frozenset(),
    draft: tuple[int, ...] = (),
) -> PlannedSequence:
    """Return the part of ``sequence`` in a step that computes its next ``count`` tokens.

    Args:
        eos: the model's own stop tokens.
        draft: tokens to verify after them, see `PlannedSequence.draft`.
    """
    # Every decoding sequence is planned in every step, so read attributes only once.
    request, known = sequence.request, len(sequence.tokens)
    start = sequence.computed + sequence.ahead
    end, length = start + count, known + sequence.awaited
    tokens = tuple(sequence.tokens[start:end])
    score: tuple[int, ...] = ()
    if request.prompt_logprobs and sequence.scores_prompt:
        # The token after each computed one; the last prompt token has none.
        score = tuple(sequence.tokens[start + 1 : min(end + 1, sequence.prompt_length)])
    samples = end == length
    counts = samples and request.sampling.needs_token_counts
    return PlannedSequence(
        sequence=sequence.id,
        digest=request.adapter.weights_digest if request.adapter else None,
        tokens=(*tokens, *draft) if end <= known else (*tokens, 0),
        start=start,
        blocks=sequence.blocks[:],
        samples=samples,
        score=score,
        logprobs=request.logprobs,
        sampling=request.sampling,
        position=length,
        top_logprobs=request.top_logprobs,
        ranks=request.prompt_ranks,
        token_counts=sequence.seen() if counts else None,
        constraint=request.constraint,
        forbidden=_forbidden(sequence, eos) if samples and request.min_tokens else (),
        carries=end > known,
        work=sequence.work,
        draft=draft,
    )


def _forbidden(sequence: Sequence, eos: frozenset[int]) -> tuple[int, ...]:
    """Return the tokens that would end the sequence before it has ``min_tokens``. As in vLLM,
    the model's own stop tokens are included even if they would not end it."""
    request = sequence.request
    if sequence.generated >= request.min_tokens:
        return ()
    return tuple(sorted(eos.union(request.stop_token_ids)))
