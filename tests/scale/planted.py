"""Planted bugs of a follower's view and of a registry's feed: the histories must catch them."""

from __future__ import annotations

from typing import Any, Final

from veneer_registry.entry import Entry
from veneer_server.follower.view import Received, View
from veneer_server.replication.feed import Feed, FeedChange
from veneer_server.replication.states import BeginFeed, Heartbeat, Key, Told


class AnyOrder(View):
    """PLANTED BUG: accepts changes in any order, and never notices that one is missing."""

    def _told(self, told: Told) -> Received:
        if self._staged is not None:
            return super()._told(told)
        self.sequence = max(self.sequence, told.sequence)
        self._put(told.state)
        return Received((told.state,))

    def _heartbeat(self, beat: Heartbeat) -> Received:
        return Received(current=True)


class OldNumbers(View):
    """PLANTED BUG: resumes by number alone, as if a registry never went back to a backup."""

    def place(self) -> tuple[str, int]:
        super().place()
        return NumberedFeed.RUN, self.sequence

    def _begin(self, begin: BeginFeed) -> Received:
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
    """PLANTED BUG: loses changes if a newer one is sent at the same time."""

    def after(self, run: str, sequence: int) -> tuple[FeedChange, ...] | None:
        changes = super().after(run, sequence)
        if not changes:
            return changes
        return (*(each for each in changes[:-1] if each.sequence % 3), changes[-1])


class BackwardsFeed(Feed):
    """PLANTED BUG: sends some old changes again after newer ones, so that the last change sent
    for a name is an old one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: dict[Key, dict[int, Entry | None]] = {}

    def told(self, change: FeedChange) -> Told:
        seen = self._seen.setdefault(change.key, {})
        seen[change.sequence] = change.entry
        older = [number for number in list(seen) if number < change.sequence]
        if change.sequence % 3 == 0 and older:
            state = self.state(change.key, seen[max(older)])
            return Told(state, change.sequence, change.sequence - 1)
        return super().told(change)


PLANTED: Final[dict[str, tuple[type[View], type[Feed]]]] = {
    "lost": (AnyOrder, ForgetfulFeed),
    "order": (AnyOrder, BackwardsFeed),
    "backup": (OldNumbers, NumberedFeed),
}
"""Name -> a view that lacks a check, and a feed that needs that check."""
