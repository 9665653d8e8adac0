"""What a step gave its sequences: the scheduler's answer to the loop."""

from __future__ import annotations

from dataclasses import dataclass

from veneer_server.engine.scheduling.sequence import Finish, Sequence
from veneer_server.step.plan import ConstraintFailure
from veneer_server.wire.messages import Tops

__all__ = ["PrefixLookups", "Update"]


@dataclass(frozen=True, slots=True)
class PrefixLookups:
    """What sequences that started and may share found in the prefix cache; in tokens."""

    asked: int = 0
    found: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What a step gave one sequence.

    Attributes:
        token, logprob: the new token; None if the sequence only prefilled.
        first: it is the sequence's first token.
        finish: set if the sequence has ended.
        finite: False if its logits were not finite; it has ended.
        tops: the most likely tokens beside the new one, if asked for.
        failure: why its constraint could not be followed; it has ended.
    """

    sequence: Sequence
    token: int | None
    logprob: float | None
    first: bool
    finish: Finish | None
    finite: bool = True
    tops: Tops | None = None
    failure: ConstraintFailure | None = None
