"""What a step produced for its sequences, as the scheduler reports it to the loop."""

from __future__ import annotations

from dataclasses import dataclass

from veneer_server.engine.scheduling.sequence import Finish, Sequence
from veneer_server.step.plan import ConstraintFailure
from veneer_server.wire.messages import Tops


@dataclass(frozen=True, slots=True)
class PrefixLookups:
    """Tokens that newly started sequences looked up and found in the prefix cache."""

    asked: int = 0
    found: int = 0


@dataclass(slots=True)
class SequenceUpdate:
    """What a step produced for one sequence. Read-only, but not frozen: a frozen dataclass
    takes three times as long to make.

    Attributes:
        token, logprob: the new token; None if the sequence only prefilled.
        first: whether it is the sequence's first token.
        finish: set if the sequence has ended.
        finite: False if its logits were not finite; the sequence has ended.
        tops: the most likely tokens at the new token's position, if requested.
        failure: why its constraint could not be followed; the sequence has ended.
        accepted: whether the token was drafted.
        rejected: draft tokens of the step that were not accepted; on its first token.
    """

    sequence: Sequence
    token: int | None
    logprob: float | None
    first: bool
    finish: Finish | None
    finite: bool = True
    tops: Tops | None = None
    failure: ConstraintFailure | None = None
    accepted: bool = False
    rejected: int = 0
