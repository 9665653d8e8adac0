"""Names and bytes that replicas get from the registry, and when.

This is the seam for the follower's own state machine: `Followers` says what a follower's view
of a name is, and stands in for it with delays alone (a change reaches a follower that is
connected after a while, and one that was not once it is back). What takes its place must keep
what `Followers.published` and `Followers.revision` promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events

__all__ = ["Followers", "Link", "Publication"]


@dataclass(slots=True)
class Publication:
    """A new revision of an adapter.

    Attributes:
        waiting: followers that do not have it yet.
        everywhere_s: from the publication until the last one had it; None before that.
    """

    adapter: int
    revision: int
    at_s: float
    waiting: set[str] = field(default_factory=set)
    everywhere_s: float | None = None


class Link:
    """The registry's connection to all replicas, which share it.

    Attributes:
        up: whether it can be reached.
        bytes: sent so far.
    """

    def __init__(self, costs: Costs, events: Events) -> None:
        self.up = True
        self.bytes = 0
        self._costs = costs
        self._events = events
        self._free = 0.0

    def fetch(self, size: int) -> float:
        """When a fetch that begins now is complete."""
        costs, now = self._costs, self._events.now
        begins = max(now, self._free)
        self._free = begins + size * costs.registry_byte_s
        self.bytes += size
        return max(self._free, begins + size * costs.fetch_byte_s) + costs.fetch_s


class Followers:
    """What each follower believes a name to mean.

    Args:
        changed: called with a follower and an adapter when its view of it has changed.
    """

    def __init__(
        self,
        names: Iterable[str],
        link: Link,
        costs: Costs,
        events: Events,
        changed: Callable[[str, int], None] = lambda name, adapter: None,
    ) -> None:
        self.publications: list[Publication] = []
        self._link = link
        self._costs = costs
        self._events = events
        self._changed = changed
        self._truth: dict[int, int] = {}
        self._views: dict[str, dict[int, int]] = {name: {} for name in names}
        self._away: set[str] = set()
        """Followers that are not connected."""

    def revision(self, follower: str, adapter: int) -> int:
        """The revision that a follower answers on: the newest that it knows, never one that was
        not published."""
        return self._views[follower].get(adapter, 0)

    def newest(self, adapter: int) -> int:
        """The revision that the registry has."""
        return self._truth.get(adapter, 0)

    def published(self, adapter: int) -> Publication:
        """A new revision, now; every follower that stays will have it."""
        revision = self._truth[adapter] = self._truth.get(adapter, 0) + 1
        publication = Publication(
            adapter, revision, self._events.now, set(self._views) - self._away
        )
        self.publications.append(publication)
        if self._link.up:
            told = 0
            for name in self._views:
                if name not in self._away:
                    told += 1
                    after = told * self._costs.notify_s + self._costs.follow_s
                    self._apply_after(after, name, {adapter: revision})
        return publication

    def leave(self, follower: str) -> None:
        """It is lost: publications wait for it no longer (its lease expires)."""
        self._away.add(follower)
        for publication in self.publications:
            self._has(publication, follower)

    def come(self, follower: str) -> None:
        """It is back, and gets a snapshot."""
        self._away.discard(follower)
        if self._link.up:
            self._snapshot(follower, 1)

    def reconnect(self) -> None:
        """The registry can be reached again: each follower gets what it missed."""
        for number, name in enumerate(self._views, 1):
            if name not in self._away:
                self._snapshot(name, number)

    def _snapshot(self, name: str, number: int) -> None:
        costs = self._costs
        after = costs.reconnect_s + number * costs.notify_s + costs.follow_s
        self._apply_after(after, name, None)

    def _apply_after(self, seconds: float, name: str, states: dict[int, int] | None) -> None:
        """Apply states, or all that are true by then."""

        def apply() -> None:
            if name in self._away or not self._link.up:
                return
            view = self._views[name]
            for adapter, revision in (self._truth if states is None else states).items():
                if revision > view.get(adapter, 0):  # an event may come after a snapshot
                    view[adapter] = revision
                    self._changed(name, adapter)
            for publication in self.publications:
                if publication.revision <= view.get(publication.adapter, 0):
                    self._has(publication, name)

        self._events.after(seconds, apply)

    def _has(self, publication: Publication, follower: str) -> None:
        publication.waiting.discard(follower)
        if not publication.waiting and publication.everywhere_s is None:
            publication.everywhere_s = self._events.now - publication.at_s
