"""Which constraint is blamed for the end of a matcher process. Uses FAKE processes, since real
failures are rare."""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
from veneer_registry.errors import InvalidField
from veneer_server.constraints.frames import (
    Advance,
    Mask,
    Masks,
    MatchingFailed,
    MatchingSetup,
    MatchSequence,
    Role,
)
from veneer_server.constraints.matched import MatchedSequence
from veneer_server.constraints.matchers import Matchers
from veneer_server.wire.messages import Constraint, ConstraintLimits

WORD = Constraint("regex", "[a-z]+")


@dataclass(eq=False)
class FakeChild:
    """FAKE: a process that takes messages and says nothing by itself."""

    number: int
    role: Role
    job: int = 0
    killed_for: str = ""
    notes: str = ""
    got: list[Any] = field(default_factory=list)

    @property
    def out_of_memory(self) -> bool:
        return "memory allocation" in self.notes

    def send(self, message: Any) -> None:
        self.got.append(message)


class World:
    """`Matchers` over fake processes, following sequences 1 to 3."""

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.followed: dict[int, MatchedSequence] = {}
        self.unheld: list[int] = []
        self.refused: dict[int, InvalidField | None] = {}
        numbers = itertools.count(1)

        def fork(role: Role) -> Any:
            self.children.append(FakeChild(next(numbers), role))
            return self.children[-1]

        self.matchers = Matchers(
            MatchingSetup("", 16, [2], ConstraintLimits()),
            fork=fork,
            followed=self.followed,
            unhold=self.unheld.append,
            report=lambda message: None,
        )
        for number in (1, 2, 3):
            one = MatchedSequence(number, WORD, self.refused_setter(number))
            self.followed[number] = one
            self.matchers.follow(one)
            self.mask(number, 0)
        assert self.refused == {1: None, 2: None, 3: None}

    def refused_setter(self, number: int) -> Any:
        return lambda error: self.refused.__setitem__(number, error)

    def mask(self, number: int, count: int, seconds: float = 0.0001) -> None:
        child: Any = self.followed[number].process
        self.matchers.heard(child, Masks([Mask(number, count, seconds, b"\xff\xff")]))

    def end(self, child: FakeChild, ended_by: int) -> None:
        self.matchers.ended(child, ended_by)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ended_by", "notes", "limit"),
    [
        (signal.SIGPROF, "", "mask_seconds"),
        (signal.SIGSEGV, "", "library"),
        (signal.SIGABRT, "memory allocation of 9 bytes failed", "memory"),
        (signal.SIGABRT, "panic in a destructor", "library"),
        (0, "OSError()", "library"),
    ],
)
def test_a_fault_ends_the_sequence_it_happened_in_and_the_rest_moves(
    ended_by: int, notes: str, limit: str
) -> None:
    world = World()
    world.matchers.advance(list(world.followed.values()), {1: 5, 2: 6, 3: 7})
    world.followed[2].held = True
    [first] = world.children
    first.job, first.notes = 2, notes
    world.end(first, ended_by)
    assert [f.failure and f.failure.limit for f in world.followed.values()] == [
        None,
        limit,
        None,
    ]
    assert world.unheld == [2]
    _, second = world.children
    assert second.got == [MatchSequence(1, WORD, [5], True), MatchSequence(3, WORD, [7], True)]


def test_a_process_killed_from_outside_twice_within_one_sequence_is_its_fault() -> None:
    world = World()
    for _ in range(2):
        child = world.children[-1]
        assert world.followed[1].failure is None
        child.job = 1
        world.end(child, signal.SIGKILL)
    assert world.followed[1].failure is not None
    assert world.followed[1].failure.limit == "memory"
    assert world.followed[2].failure is None


def test_an_end_between_jobs_is_nobodys_fault() -> None:
    world = World()
    world.end(world.children[0], signal.SIGKILL)
    assert all(f.failure is None for f in world.followed.values())
    assert len(world.children[1].got) == 3


def test_what_a_former_process_still_says_is_not_listened_to() -> None:
    world = World()
    former: Any = world.children[0]
    world.end(former, signal.SIGKILL)
    world.matchers.heard(former, MatchingFailed(1, "fuel", "old news"))
    assert world.followed[1].failure is None


def test_a_slow_mask_counts_and_moves_its_sequence() -> None:
    world = World()
    world.matchers.advance([world.followed[1]], {1: 5})
    world.mask(1, 1, seconds=0.02)
    assert world.followed[1].ready
    quick, slow = world.children
    assert (quick.role, slow.role) == ("quick", "slow")
    assert slow.got == [MatchSequence(1, WORD, [5], True)]
    world.matchers.advance([world.followed[1]], {1: 6})
    assert slow.got[1:] == [Advance([(1, 6)])]
    assert not world.followed[1].ready
    world.mask(1, 1)  # of the state before: it comes too late to count
    assert not world.followed[1].ready
    world.mask(1, 2)
    assert world.followed[1].ready


def test_a_long_text_is_followed_anew_in_pieces() -> None:
    world = World()
    tokens = list(range(20_000))
    world.followed[1].tokens = tokens
    world.end(world.children[0], signal.SIGKILL)
    pieces = [m for m in world.children[1].got if m.sequence == 1]
    assert [t for piece in pieces for t in piece.tokens] == tokens
    assert [piece.last for piece in pieces] == [False, False, True]
    assert [piece.constraint for piece in pieces] == [WORD, None, None]
