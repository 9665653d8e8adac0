"""Sequences that wait, grouped by adapter.

What a step asks of them (who may start, which adapters to load) takes time by the number of
adapters and of places, not by the number of sequences: thousands may wait.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, KeysView, Set
from dataclasses import dataclass, field
from itertools import islice

from veneer_server.engine.scheduling.sequence import Sequence

__all__ = ["WaitingGroup", "WaitingSequences"]


def _place(sequence: Sequence) -> int:
    return sequence.place


@dataclass(slots=True, eq=False)
class WaitingGroup:
    """The waiting sequences of one adapter, or of the base; never empty.

    Attributes:
        digest: None for the base.
        sequences: by id, in order of their places.
    """

    digest: str | None
    sequences: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)
    _new: list[Sequence] = field(default_factory=list)
    """Their wait for the adapter has not begun yet."""
    _since: float | None = None
    """When the adapter was last found missing; None while it is resident."""
    _missed: float = 0.0
    """Seconds without the adapter before that."""

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences.values())

    @property
    def place(self) -> int:
        """Of its first sequence."""
        return next(iter(self.sequences.values())).place

    def join(self, sequence: Sequence, *, first: bool) -> None:
        """Add a sequence, behind the others or in front of them."""
        self.sequences[sequence.id] = sequence
        self.sequences.move_to_end(sequence.id, last=not first)
        self._new.append(sequence)

    def note(self, resident: bool, now: float) -> None:
        """Whether the adapter is resident now: measures waits for it, not for a place."""
        if resident and self._since is not None:
            self._missed += now - self._since
            self._since = None
        elif not resident and self._since is None:
            self._since = now
        for sequence in self._new:
            sequence.load_seconds -= self._waited(now)
        self._new.clear()

    def started(self, sequence: Sequence, now: float) -> None:
        """Complete a sequence's ``load_seconds``; after `note` in the same step."""
        sequence.load_seconds += self._waited(now)

    def _waited(self, now: float) -> float:
        return self._missed + (0.0 if self._since is None else now - self._since)


class WaitingSequences:
    """All of them. A sequence's ``place`` is its order among all: lower goes first."""

    def __init__(self) -> None:
        self._groups: dict[str | None, WaitingGroup] = {}
        self._in_order: list[WaitingGroup] = []
        """By the places of their first sequences."""
        self._changed: set[str | None] = set()
        """Groups that sequences joined since residency was last noted."""
        self._resident: Set[str] = frozenset()
        self._count = self._front = self._back = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In order: preempted sequences, the last one first, then those that arrived."""
        return heapq.merge(*self._groups.values(), key=_place)

    def group(self, digest: str | None) -> WaitingGroup | None:
        """The sequences of an adapter, if any wait."""
        return self._groups.get(digest)

    @property
    def keys(self) -> KeysView[str | None]:
        """Weights digests, and None if sequences of the base wait."""
        return self._groups.keys()

    def wanted(self, most: int) -> list[str]:
        """Weights digests by their oldest sequences, the oldest first."""
        found = (g.digest for g in self._in_order if g.digest is not None)
        return list(islice(found, most))

    def adapters_of_first(self, count: int) -> int:
        """How many adapters the first ``count`` sequences use."""
        # They are in the first groups: each group before the last of them has one at least.
        first = heapq.merge(*self._in_order[:count], key=_place)
        return len({s.digest for s in islice(first, count)} - {None})

    # ------------------------------------------------------------------ in and out

    def append(self, sequence: Sequence) -> None:
        """Add a sequence behind all others."""
        self._back += 1
        sequence.place = self._back
        self._join(sequence, first=False)

    def appendleft(self, sequence: Sequence) -> None:
        """Add a preempted sequence before all others."""
        self._front -= 1
        sequence.place = self._front
        self._join(sequence, first=True)

    def _join(self, sequence: Sequence, *, first: bool) -> None:
        group = self._groups.get(sequence.digest)
        if group is None:
            group = self._groups[sequence.digest] = WaitingGroup(sequence.digest)
        elif first:
            self._take_out(group)
        new = not group.sequences
        group.join(sequence, first=first)
        if first:
            self._in_order.insert(0, group)
        elif new:
            self._in_order.append(group)
        self._changed.add(sequence.digest)
        self._count += 1

    def remove(self, sequence: Sequence, now: float | None = None) -> None:
        """Remove a sequence.

        Args:
            now: it starts; None if it ends.
        """
        group = self._groups[sequence.digest]
        if now is not None:
            group.started(sequence, now)
        leads = group.place == sequence.place
        if leads:
            self._take_out(group)
        del group.sequences[sequence.id]
        if not group.sequences:
            del self._groups[sequence.digest]
        elif leads:
            at = bisect_left(self._in_order, group.place, key=lambda each: each.place)
            self._in_order.insert(at, group)
        self._count -= 1

    def _take_out(self, group: WaitingGroup) -> None:
        at = bisect_left(self._in_order, group.place, key=lambda each: each.place)
        assert self._in_order[at] is group, "groups are out of order"
        del self._in_order[at]

    # ------------------------------------------------------------------ adapters

    def note_resident(self, resident: Set[str], now: float) -> None:
        """Measure waits for adapters.

        Args:
            resident: of the adapters that sequences wait for, those that are resident.
        """
        for digest in (resident ^ self._resident) | self._changed:
            if (group := self._groups.get(digest)) is not None:
                group.note(digest is None or digest in resident, now)
        self._changed.clear()
        self._resident = resident
