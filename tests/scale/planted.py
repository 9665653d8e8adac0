"""Planted bugs of a follower's view and of a registry's feed: the histories must catch them."""

from __future__ import annotations

from typing import Any, Final

from veneer_server.follower.view import Received, View
from veneer_server.replication.feed import Change, Feed
from veneer_server.replication.states import Begin, Heartbeat, Told

__all__ = ["PLANTED", "AnyOrder", "NumberedFeed", "OldNumbers"]


class AnyOrder(View):
    """PLANTED BUG: takes changes in whatever order they come, and misses none."""

    def _told(self, told: Told) -> Received:
        if self._staged is not None:
            return super()._told(told)
        self.sequence = max(self.sequence, told.sequence)
        self._put(told.state)
        return Received((told.state,))

    def _heartbeat(self, beat: Heartbeat) -> Received:
        return Received(current=True)


class OldNumbers(View):
    """PLANTED BUG: goes on by number alone, as if a registry never went back."""

    def place(self) -> tuple[str, int]:
        super().place()
        return NumberedFeed.RUN, self.sequence

    def _begin(self, begin: Begin) -> Received:
        self.run = begin.run
        return super()._begin(begin)

    def _heartbeat(self, beat: Heartbeat) -> Received:
        return Received(current=True)


class NumberedFeed(Feed):
    """PLANTED BUG: every run of the registry has the same id."""

    RUN: Final = "run"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.run = self.RUN


class ForgetfulFeed(Feed):
    """PLANTED BUG: loses changes, where a newer one is told at once."""

    def after(self, run: str, sequence: int) -> tuple[Change, ...] | None:
        changes = super().after(run, sequence)
        if not changes:
            return changes
        return (*(each for each in changes[:-1] if each.sequence % 3), changes[-1])


class BackwardsFeed(Feed):
    """PLANTED BUG: tells the newest change first."""

    def after(self, run: str, sequence: int) -> tuple[Change, ...] | None:
        changes = super().after(run, sequence)
        return changes and tuple(reversed(changes))


PLANTED: Final[dict[str, tuple[type[View], type[Feed]]]] = {
    "lost": (AnyOrder, ForgetfulFeed),
    "order": (AnyOrder, BackwardsFeed),
    "backup": (OldNumbers, NumberedFeed),
}
"""What each plants: a view that does not check, and a feed that needs to be checked."""
