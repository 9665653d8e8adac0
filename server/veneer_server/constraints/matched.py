"""The engine's state of each constrained sequence, and which process follows it. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.constraints.family import MatcherChild
from veneer_server.step.plan import ConstraintFailure, ConstraintState
from veneer_server.wire.messages import Constraint

SLOW_MASK_S: Final = 0.005
"""A sequence is followed by the slow process, at low priority, once a mask took longer than
this (CPU seconds). Steps never wait for such a sequence."""

SLOW_TRIAL_S: Final = 0.02
"""The same for compiling, which in the quick process would delay other masks."""

_REPLAY: Final = 8192
"""Maximum number of tokens in one packet."""

DEATHS: Final = 2
"""After this many exits of a process while it worked for a sequence, the sequence is blamed."""


@dataclass(slots=True, eq=False)
class MatchedSequence:
    """One sequence, from `Grammars.compile` to `Grammars.forget`.

    Attributes:
        done: called once, when it may start or is refused; None after that.
        tokens: tokens chosen so far.
        process: the process that follows it; None until its trial has ended.
        confirmed: number of tokens that the process has confirmed.
        bits: mask of the tokens that may follow after ``mask_at`` tokens, a bit for each.
        stopped: whether nothing more may follow.
        failure: why it cannot continue.
        slow: whether its masks or its trial took long; see `SLOW_MASK_S`.
        held: whether the step loop waits for the callback that it can continue or has ended.
        deaths: exits of its process while the process worked for this sequence.
    """

    sequence: int
    constraint: Constraint
    done: Callable[[InvalidField | None], None] | None
    tokens: list[int] = field(default_factory=list)
    process: MatcherChild | None = None
    confirmed: int = 0
    bits: bytes = b""
    mask_at: int = -1
    stopped: bool = False
    failure: ConstraintFailure | None = None
    slow: bool = False
    held: bool = False
    deaths: int = 0

    @property
    def ready(self) -> bool:
        """Whether everything that the next step needs is known."""
        return self.mask_at == len(self.tokens) or self.stopped or self.failure is not None

    def how(self) -> ConstraintState:
        """The sequence's state after its last token; if LATE, it is held from now on."""
        if self.stopped:
            return ConstraintState.COMPLETE
        if self.slow and not self.ready:
            self.held = True
            return ConstraintState.LATE
        return ConstraintState.GOES_ON

    def replay(self) -> list[tuple[list[int], bool]]:
        """The tokens in pieces of at most `_REPLAY`, each with whether it is the last."""
        cuts = range(0, max(1, len(self.tokens)), _REPLAY)
        pieces = [self.tokens[at : at + _REPLAY] for at in cuts]
        return [(piece, at + 1 == len(pieces)) for at, piece in enumerate(pieces)]


def refusal(constraint: Constraint, limit: str, problem: str) -> InvalidField:
    """The error for the caller."""
    name = f"constraint.{constraint.kind}"
    metadata = {"field": name} | ({"limit": limit} if limit else {})
    return InvalidField(
        f"{name} cannot be used: {problem}. Correct or simplify it", metadata=metadata
    )
