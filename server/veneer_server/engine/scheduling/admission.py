"""Which waiting sequences may start, in what order, and for how long one can be overtaken.

* Preempted sequences go first, the most recently preempted one first.
* Next comes the tenant that has had the least service (`fair_shares`), and for a gateway's
  tenant, its user that has had the least.
* Within such a share, the sequences of the most urgent priority go first (`Sequence.urgency`).
  A priority is worth seconds of waiting, so no sequence waits for ever.
* Within a priority, adapters take turns; within an adapter, sequences go in order of arrival.

Two rules about adapters modify this order, each within a bound:

* While more sequences are ready than there are places, a tenant's adapters that are already
  in the batch go first, since each further adapter makes a step more expensive. This
  stops for a sequence `max_wait` seconds after its arrival: from then on each other adapter
  of its tenant, at the same priority, starts at most one sequence before it.
* A sequence whose adapter is being loaded is passed over. If there is no *room* for the
  adapter, the sequence is passed over for `patience` seconds. From then on, no sequence behind
  it starts that could keep the room occupied: neither younger sequences of its share, nor
  those of other shares whose turn to load an adapter is later. So the room becomes free when
  the sequences now running have ended.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Final

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.fair_shares import Share
from veneer_server.engine.scheduling.sequence import Sequence, SequenceState
from veneer_server.engine.scheduling.waiting import Flow, WaitingGroup, WaitingSequences

_Order = tuple[float, int]
"""A value of `WaitingGroup.order`."""

_BEFORE_ALL: Final[_Order] = (float("-inf"), -sys.maxsize)


class Admission:
    """Decides the order; the scheduler starts the sequences.

    Args:
        patience, max_wait: seconds; see the module docstring.
    """

    def __init__(self, residency: Residency, *, patience: float, max_wait: float) -> None:
        self._residency = residency
        self._patience = patience
        self._max_wait = max_wait
        self._lacking: tuple[str, float] | None = None
        """(adapter, since when): the first want that finds no room."""

    @property
    def lacking(self) -> str | None:
        """The first want that finds no room, no matter for how long."""
        return self._lacking[0] if self._lacking else None

    def note_lack_of_room(self, digest: str | None, now: float) -> None:
        """Record which want finds no room, if any. Call after each planning of adapters."""
        if digest is None:
            self._lacking = None
        elif self._lacking is None or self._lacking[0] != digest:
            self._lacking = (digest, now)

    def lacking_too_long(self, now: float) -> str | None:
        """The first want that finds no room, if it has found none for `patience` seconds."""
        if self._lacking is None or now - self._lacking[1] < self._patience:
            return None
        return self._lacking[0]

    def note(self, waiting: WaitingSequences, now: float) -> None:
        """Record which sequences could start. Call once per step, before `order`."""
        waiting.note_resident(self._residency.ready_among(waiting.keys), now)

    def order(
        self,
        waiting: WaitingSequences,
        *,
        in_batch: Collection[str],
        places: int,
        now: float,
    ) -> Iterator[Sequence]:
        """Yield the sequences that may start now, in order.

        The iterator is lazy: the caller starts each sequence before it asks for the next one,
        so that its service counts. If the caller leaves one waiting instead, no more of its
        share follow. The caller must stop at the first sequence that gets no blocks, or others
        would take the blocks that it waits for.

        Args:
            in_batch: adapters of running sequences.
            places: how many more sequences may run.
        """
        if places <= 0:
            return iter(())
        lacking = self._lacking_group(waiting, now)
        # A list: preempted sequences stay in the queue, and the caller may pass them over.
        first = list(self._preempted(waiting.preempted, lacking))
        flows = [flow for flow in waiting.flows.values() if flow.ready]
        if not flows:
            return iter(first)
        contended = len(first) + _ready(flows) > places
        turns = _Turns(
            in_batch,
            overdue=now - self._max_wait,
            contended=contended,
            end=lambda group: self._end(group, lacking),
        )
        return chain(first, _fairly(flows, {flow: turns.of(flow) for flow in flows}))

    def _preempted(self, flow: Flow, lacking: _Lacking | None) -> Iterator[Sequence]:
        """Yield the preempted sequences that may start, in order."""
        return heapq.merge(
            *(_until(group, self._end(group, lacking)) for group in flow.ready),
            key=lambda s: s.urgency,
        )

    def _end(self, group: WaitingGroup, lacking: _Lacking | None) -> _Order | None:
        """Return the order from which on none of the group may start; None if all may."""
        if lacking is None or not keeps_room(self._residency, group.digest):
            return None
        return lacking.end(group)

    def _lacking_group(self, waiting: WaitingSequences, now: float) -> _Lacking | None:
        """Return the want that has waited too long for room, if there is one."""
        digest = self.lacking_too_long(now)
        if digest is None:
            return None
        # If no queued sequence has this want, an operator does, and operators come first.
        found = min(
            ((_standing(group), group) for group in waiting.groups(digest)),
            key=lambda each: each[0],
            default=None,
        )
        return _Lacking(None, 0) if found is None else _Lacking(found[1], found[0][0])


@dataclass(frozen=True, slots=True)
class _Lacking:
    """A want that has found no room for too long.

    Attributes:
        group: the sequences that want the adapter; None if an operator does.
        rank: how many wants of its flow come before it.
    """

    group: WaitingGroup | None
    rank: int

    def end(self, group: WaitingGroup) -> _Order | None:
        """Return the order from which on no sequence of ``group`` may start; None if all may.

        Only for groups whose sequences would keep an adapter's room occupied. Those whose
        adapters are planned before the want (see `WaitingSequences.wanted`) may start: if they
        were held back, neither they nor the want would make progress."""
        lacking = self.group
        if lacking is None:
            return _BEFORE_ALL
        if group.flow is lacking.flow:
            return lacking.order
        if group.flow is None:
            return None
        if lacking.flow is None:
            return _BEFORE_ALL
        before = self.rank + (group.flow.since < lacking.flow.since)
        return None if group in group.flow.in_order[:before] else _BEFORE_ALL


def _standing(group: WaitingGroup) -> tuple[int, int]:
    """Sort key: the order in which the adapters of groups are loaded."""
    if group.flow is None:
        return -1, group.first.place
    return group.flow.in_order.index(group), group.flow.since


def _ready(flows: Iterable[Flow]) -> int:
    """Number of sequences whose adapters are resident; some may be held back."""
    return sum(len(group.sequences) for flow in flows for group in flow.ready)


def _until(group: WaitingGroup, end: _Order | None) -> Iterator[Sequence]:
    if end is None:
        return iter(group)
    return takewhile(lambda s: s.urgency < end, group)


def keeps_room(residency: Residency, digest: str | None) -> bool:
    """Whether running a sequence would prevent its adapter's eviction. An adapter that is
    pinned to DEVICE cannot be evicted anyway."""
    return digest is not None and not residency.pinned(digest, "device")


@dataclass(frozen=True, slots=True)
class _Turns:
    """Orders the sequences of each flow in one step.

    Attributes:
        in_batch: adapters of running sequences.
        overdue: sequences that arrived by this time have waited for `max_wait`.
        contended: whether more sequences are ready than there are places.
        end: returns the order from which on no sequence of a group may start; None if all may.
    """

    in_batch: Collection[str]
    overdue: float
    contended: bool
    end: Callable[[WaitingGroup], _Order | None]

    def of(self, flow: Flow) -> Iterator[Sequence]:
        """Yield the ready sequences of a flow that may start: by priority, then adapters in
        turns."""
        levels = self._levels(flow)
        heap = [self._entry(group, levels) for group in flow.ready]
        heapq.heapify(heap)
        while heap:
            *_, group = heapq.heappop(heap)
            sequence = group.first
            end = self.end(group)
            if end is not None and group.order >= end:
                continue
            yield sequence
            if sequence.state is SequenceState.WAITING:
                return  # nothing of its flow may overtake it
            # It has started, and its group's turn is over.
            if group.sequences:
                heapq.heappush(heap, self._entry(group, levels))

    @staticmethod
    def _levels(flow: Flow) -> dict[int, _Order]:
        """Map each priority to the order of its first sequence; empty if there is only one
        priority."""
        levels: dict[int, _Order] = {}
        priorities = {group.priority for group in flow.ready}
        if len(priorities) > 1:
            for group in flow.ready:
                order = group.order
                levels[group.priority] = min(order, levels.get(group.priority, order))
        return levels

    def _entry(
        self, group: WaitingGroup, levels: dict[int, _Order]
    ) -> tuple[_Order, int, int, WaitingGroup]:
        return (
            levels.get(group.priority, _BEFORE_ALL),
            self._rank(group) if self.contended else 0,
            group.turn,
            group,
        )

    def _rank(self, group: WaitingGroup) -> int:
        if group.first.arrived <= self.overdue:
            return 0
        return 1 if group.digest is None or group.digest in self.in_batch else 2


def _fairly(flows: list[Flow], turns: dict[Flow, Iterator[Sequence]]) -> Iterator[Sequence]:
    """Yield the sequences of all flows, in the order of their shares' counters."""
    if len(flows) == 1:
        return turns[flows[0]]
    tenants: dict[Share, list[tuple[Share, Iterator[Sequence]]]] = {}
    for flow in flows:
        share = flow.share
        assert share is not None
        assert share.owner is not None
        tenants.setdefault(share.owner, []).append((share, turns[flow]))
    return _least_first([(owner, _least_first(parts)) for owner, parts in tenants.items()])


def _least_first(parts: list[tuple[Share, Iterator[Sequence]]]) -> Iterator[Sequence]:
    """Repeatedly yield the next sequence of the share with the lowest counter.

    Of shares with equal counters, the last one in ``parts`` goes first: it has just been lifted
    to the counter of the others, which have had service meanwhile."""
    if len(parts) == 1:
        yield from parts[0][1]
        return
    heap = [(share.counter, -at) for at, (share, _) in enumerate(parts)]
    heapq.heapify(heap)
    while heap:
        _, at = heap[0]
        share, sequences = parts[-at]
        sequence = next(sequences, None)
        if sequence is None:
            heapq.heappop(heap)
            continue
        yield sequence
        if sequence.state is SequenceState.WAITING:
            heapq.heappop(heap)  # the caller passed it over, so its share is passed over too
            continue
        # It has started, and was charged.
        heapq.heapreplace(heap, (share.counter, at))
