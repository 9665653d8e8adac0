"""What the engine knows of each constrained sequence, and which process follows it. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.constraints.family import Child
from veneer_server.step.plan import ConstraintFailure, Following
from veneer_server.wire.messages import Constraint

__all__ = ["DEATHS", "SLOW_MASK_S", "SLOW_TRIAL_S", "Followed", "refusal"]

SLOW_MASK_S: Final = 0.005
"""A sequence one of whose masks took longer (CPU time) is followed by the process for
slow ones, at low priority, and never waited for."""

SLOW_TRIAL_S: Final = 0.02
"""The same for compiling: in the other process it would delay the masks of the rest."""

_REPLAY: Final = 8192
"""Tokens in one packet."""

DEATHS: Final = 2
"""So many ends of a process while it worked for the same sequence are that one's fault."""


@dataclass(slots=True, eq=False)
class Followed:
    """One sequence, from `Grammars.compile` to `Grammars.forget`.

    Attributes:
        done: told once, when it may start or is refused; None after that.
        tokens: those chosen so far.
        process: which follows it; None before its trial has ended.
        confirmed: tokens that the process has taken, of which it said so.
        bits: what may follow after ``mask_at`` tokens, a bit for each token.
        stopped: nothing more may follow.
        failure: why it cannot go on.
        slow: its masks take long; see `SLOW_MASK_S`.
        held: the step loop waits to be told that it can go on, or that it has ended.
        deaths: ends of a process, by no signal of its own, while it worked for this one.
    """

    sequence: int
    constraint: Constraint
    done: Callable[[InvalidField | None], None] | None
    tokens: list[int] = field(default_factory=list)
    process: Child | None = None
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
        """What the next step needs to know of it is known."""
        return self.mask_at == len(self.tokens) or self.stopped or self.failure is not None

    def how(self) -> Following:
        """How it goes on; held from now on where that is LATE."""
        if self.stopped:
            return Following.COMPLETE
        if self.slow and not self.ready:
            self.held = True
            return Following.LATE
        return Following.GOES_ON

    def replay(self) -> list[tuple[list[int], bool]]:
        """Its tokens in pieces, and whether each is the last."""
        cuts = range(0, max(1, len(self.tokens)), _REPLAY)
        pieces = [self.tokens[at : at + _REPLAY] for at in cuts]
        return [(piece, at + 1 == len(pieces)) for at, piece in enumerate(pieces)]


def refusal(constraint: Constraint, limit: str, problem: str) -> InvalidField:
    """What its caller is told."""
    name = f"constraint.{constraint.kind}"
    metadata = {"field": name} | ({"limit": limit} if limit else {})
    return InvalidField(
        f"{name} cannot be used: {problem}. Correct or simplify it", metadata=metadata
    )
