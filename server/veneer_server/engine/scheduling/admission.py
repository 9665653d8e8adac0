"""Which waiting sequences may start, in what order, and how long one can be overtaken.

Order is arrival order, with three exceptions and a bound on each:

* A sequence whose adapter is being loaded is passed over: nothing that starts
  meanwhile delays the transfer, and when it ends the sequence is the oldest.
* A sequence whose adapter finds no *room* is passed over for `patience` seconds.
  From then on no younger sequence's adapter is loaded into the missing room, and
  nothing younger starts that could keep it occupied, so the room becomes free when
  the sequences now running have ended.
* While more sequences are ready than there are places, those that add no adapter to
  the batch go first, since each further adapter makes a step more expensive. This
  stops for a sequence `max_wait` seconds after its arrival: from then on, and after a
  preemption, nothing younger starts before it.

So once a sequence is `max_wait` old and its adapter is resident, only older sequences
and those already running are ahead of it, and all of them end.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, dropwhile, islice, takewhile
from typing import Final

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.waiting import WaitingGroup, WaitingSequences

__all__ = ["Admission"]

_BEFORE_ALL: Final = -sys.maxsize


class Admission:
    """Decides the order; the scheduler starts the sequences.

    Args:
        patience, max_wait: seconds; see the module.
    """

    def __init__(self, residency: Residency, *, patience: float, max_wait: float) -> None:
        self._residency = residency
        self._patience = patience
        self._max_wait = max_wait
        self._lacking: tuple[str, float] | None = None
        """(adapter, since): the oldest want that finds no room."""

    @property
    def lacking(self) -> str | None:
        """The oldest want that finds no room, no matter for how long."""
        return self._lacking[0] if self._lacking else None

    def note_lack_of_room(self, digest: str | None, now: float) -> None:
        """Record, after each planning of adapters, which want finds no room, if any."""
        if digest is None:
            self._lacking = None
        elif self._lacking is None or self._lacking[0] != digest:
            self._lacking = (digest, now)

    def order(
        self,
        waiting: WaitingSequences,
        *,
        in_batch: Collection[str],
        places: int,
        most: int,
        now: float,
    ) -> list[Sequence]:
        """Sequences that may start now, in order. The caller must stop at the first one
        that gets no blocks, or younger ones would take the blocks that it waits for.

        Args:
            in_batch: adapters of running sequences.
            places: how many more sequences may run.
            most: how many to return at most.
        """
        resident = self._residency.ready_among(waiting.keys)
        waiting.note_resident(resident, now)
        if places <= 0:
            return []
        # Places before which a sequence may start though it keeps its adapter's room.
        end = self._end_of_room(waiting, now)
        ready: list[_Ready] = []
        for digest in (None, *resident):
            group = waiting.group(digest)
            if group is not None:
                ready.append(_Ready(group, end if self._keeps_room(digest) else None))
        if not _more_than(places, ready):
            return list(islice(_merged(each.all() for each in ready), most))
        # Ties in order of arrival: what goes first whatever its adapter, then those that add
        # no adapter to the batch, then the others.
        first = _merged(takewhile(self._overdue(now), each.all()) for each in ready)
        rest: dict[bool, list[Iterator[Sequence]]] = {True: [], False: []}
        for each in ready:
            digest = each.group.digest
            adds_none = digest is None or digest in in_batch
            rest[adds_none].append(dropwhile(self._overdue(now), each.all()))
        return list(islice(chain(first, _merged(rest[True]), _merged(rest[False])), most))

    def _end_of_room(self, waiting: WaitingSequences, now: float) -> int | None:
        """From this place on nothing may start that keeps an adapter's room: a sequence has
        waited too long for some. None if there is no such place."""
        lacking = self.lacking_too_long(now)
        if lacking is None:
            return None
        group = waiting.group(lacking)
        # If no queued sequence has this want, it is an operator's, which precedes them all.
        return _BEFORE_ALL if group is None else group.place

    def _overdue(self, now: float) -> Callable[[Sequence], bool]:
        """Whether a sequence was preempted, or has waited for `max_wait`. In a group those that
        are go first."""
        return lambda s: s.admitted is not None or now - s.arrived >= self._max_wait

    def lacking_too_long(self, now: float) -> str | None:
        """The oldest want that finds no room, if it has found none for `patience` seconds."""
        if self._lacking is None or now - self._lacking[1] < self._patience:
            return None
        return self._lacking[0]

    def _keeps_room(self, digest: str | None) -> bool:
        """Whether running a sequence would prevent its adapter's eviction. An adapter that is
        pinned to DEVICE cannot be evicted anyway."""
        return digest is not None and not self._residency.pinned(digest, "device")


@dataclass(frozen=True, slots=True)
class _Ready:
    """Sequences whose adapter is resident: those before place ``end``, or all."""

    group: WaitingGroup
    end: int | None

    def all(self) -> Iterator[Sequence]:
        if self.end is None:
            return iter(self.group)
        end = self.end
        return takewhile(lambda s: s.place < end, self.group)


def _more_than(places: int, ready: Iterable[_Ready]) -> bool:
    count = 0
    for each in ready:
        if each.end is None:
            count += len(each.group)
        else:
            count += sum(1 for _ in islice(each.all(), places + 1 - count))
        if count > places:
            return True
    return False


def _merged(groups: Iterable[Iterator[Sequence]]) -> Iterator[Sequence]:
    """Of all, in order of their places."""
    return heapq.merge(*groups, key=lambda s: s.place)
