"""What a leader says to its followers, over decoders that are FAKES."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from veneer_server.backends.parallel.leading import Leading, MemberLink, PartMember
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.inbox import NoSlot
from veneer_server.step.layout import Layout

from tests.refused import refused
from tests.unit.server.cuda import parallel_kit as kit


@dataclass
class Places:
    """FAKE memory for so many adapters."""

    room: int
    runs: dict[AdapterTable, torch.Tensor] = field(default_factory=dict)

    def place(self, layout: Layout, run: torch.Tensor) -> AdapterTable:
        if len(self.runs) == self.room:
            raise NoSlot("full")
        table = AdapterTable(layout, torch.empty(layout.length, device="meta"))
        self.runs[table] = run
        return table

    def part(self, layout: Layout) -> int:
        return layout.length // 2

    def release(self, table: AdapterTable) -> None:
        del self.runs[table]


class Decoder:
    """FAKE: remembers what it executes."""

    weights: Any = None

    def __init__(self, room: int) -> None:
        self.adapters = Places(room)
        self.steps: list[Any] = []

    def execute(self, step: Any) -> Any:
        self.steps.append(step)


def _pair(mine: int, theirs: int) -> tuple[Leading, Decoder, PartMember, Decoder, MemberLink]:
    steps, their_steps = Pipe()
    copies, their_copies = Pipe()
    own, other = Decoder(mine), Decoder(theirs)
    follower = PartMember(other, lambda count: torch.empty(count, dtype=torch.bfloat16))  # type: ignore[arg-type]
    threading.Thread(target=follower.copy, args=(their_copies,), daemon=True).start()
    leading = Leading(own, [MemberLink(steps, copies)])  # type: ignore[arg-type]
    return leading, own, follower, other, MemberLink(their_steps, their_copies)


def _run() -> tuple[Layout, torch.Tensor]:
    layout, run = kit.adapter(1)
    return layout, run.bfloat16()


def test_a_follower_has_the_leader_s_adapters_and_steps() -> None:
    leading, own, follower, other, link = _pair(2, 2)
    layout, run = _run()
    tables = [leading.adapters.place(layout, run + at) for at in range(2)]
    for mine, theirs in zip(
        own.adapters.runs.values(), other.adapters.runs.values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    step = kit.steps(*reversed(tables))[0]
    leading.execute(step)
    follower.step(*link.steps.recv())
    (found,) = other.steps
    order = [list(each.adapters.runs) for each in (own, other)]
    for mine, theirs in zip(step.segments, found.segments, strict=True):
        assert (mine.begin, mine.end) == (theirs.begin, theirs.end)
        assert order[0].index(mine.table) == order[1].index(theirs.table)
    leading.adapters.release(tables[0])
    follower.step(*link.steps.recv())
    assert len(other.adapters.runs) == len(own.adapters.runs) == 1
    assert order[1][1] in other.adapters.runs


@pytest.mark.parametrize("rooms", [(1, 0), (0, 1)])
def test_an_adapter_is_placed_everywhere_or_nowhere(rooms: tuple[int, int]) -> None:
    leading, own, _, other, _ = _pair(*rooms)
    with refused(NoSlot):
        leading.adapters.place(*_run())
    # An answer to the next message comes after the release.
    with refused(NoSlot):
        leading.adapters.place(*_run())
    assert not own.adapters.runs
    assert len(other.adapters.runs) <= rooms[1]
