"""The queue: preempted sequences, and those that have not started, by share and adapter.

The queries of a step (which sequences may start, which adapters to load) take time proportional
to the number of adapters, shares and places, not of sequences: thousands may wait.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, KeysView, Set
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from operator import attrgetter, itemgetter

from veneer_server.engine.scheduling.fair_shares import FairShares, Share
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.wire.messages import PRIORITY_SECONDS

_urgency = attrgetter("urgency")
_place = attrgetter("place")
_order = attrgetter("order")


@dataclass(slots=True, eq=False)
class WaitingGroup:
    """The waiting sequences of one flow, adapter (or the base) and priority; never empty.

    Attributes:
        digest: weights digest of the adapter; None for the base.
        flow: None for preempted sequences.
        sequences: by id, in the order in which they may start.
        turn: in each flow, the group with the lowest turn is next.
    """

    digest: str | None
    flow: Flow | None
    priority: int = 0
    sequences: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)
    turn: int = 0
    _new: list[Sequence] = field(default_factory=list)
    """Sequences that joined since the last `note`: their wait is not measured yet."""
    _since: float | None = None
    """When the adapter was last found missing; None while it is resident."""
    _missed: float = 0.0
    """Total seconds without the adapter before `_since`."""

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences.values())

    @property
    def first(self) -> Sequence:
        return next(iter(self.sequences.values()))

    @property
    def order(self) -> tuple[float, int]:
        """`Sequence.urgency` of the first sequence."""
        return self.first.urgency

    def join(self, sequence: Sequence) -> None:
        """Add a sequence in order of urgency. It need not go last: a preempted one goes before
        all others, and a further sample counts as having arrived with its request."""
        behind = takewhile(
            lambda other: other.urgency > sequence.urgency, reversed(self.sequences.values())
        )
        moved = [other.id for other in behind]
        self.sequences[sequence.id] = sequence
        for id in reversed(moved):
            self.sequences.move_to_end(id)
        self._new.append(sequence)

    def note(self, resident: bool, now: float) -> None:
        """Record whether the adapter is resident now. This measures the wait for the adapter,
        not for a place."""
        if resident and self._since is not None:
            self._missed += now - self._since
            self._since = None
        elif not resident and self._since is None:
            self._since = now
        for sequence in self._new:
            sequence.load_seconds -= self._waited(now)
        self._new.clear()

    def started(self, sequence: Sequence, now: float) -> None:
        """Complete a sequence's ``load_seconds``. Call after `note`, in the same step."""
        sequence.load_seconds += self._waited(now)

    def _waited(self, now: float) -> float:
        return self._missed + (0.0 if self._since is None else now - self._since)


@dataclass(slots=True, eq=False)
class Flow:
    """The waiting sequences of one share, or all preempted ones; only the latter may be empty.

    Attributes:
        share: None for preempted sequences.
        groups: by adapter and priority.
        in_order: the same groups, sorted by `WaitingGroup.order`.
        ready: groups whose adapter is resident.
        since: its turn to load an adapter; lower is earlier.
    """

    share: Share | None
    groups: dict[tuple[str | None, int], WaitingGroup] = field(default_factory=dict)
    in_order: list[WaitingGroup] = field(default_factory=list)
    ready: dict[WaitingGroup, None] = field(default_factory=dict)
    since: int = 0

    def __iter__(self) -> Iterator[Sequence]:
        return _merged(self.in_order)

    def put(self, group: WaitingGroup) -> None:
        """Insert a group into `in_order`, after its first sequence has changed."""
        order = group.order
        if not self.in_order or self.in_order[-1].order < order:
            self.in_order.append(group)
            return
        at = bisect_left(self.in_order, order, key=_order)
        self.in_order.insert(at, group)

    def take_out(self, group: WaitingGroup) -> None:
        """Remove a group from `in_order`, before its first sequence changes."""
        at = bisect_left(self.in_order, group.order, key=_order)
        assert self.in_order[at] is group, "groups are out of order"
        del self.in_order[at]

    def groups_of_first(self, count: int) -> int:
        """How many of the first groups in `in_order` the first ``count`` sequences are in."""
        if count <= 1 or len(self.in_order) <= 1:
            return min(count, len(self.in_order))
        # A group has one of these sequences exactly if its first is not behind their last.
        *_, last = islice(_merged(self.in_order[:count]), count)
        return bisect_right(self.in_order, last.urgency, key=_order)


class WaitingSequences:
    """All waiting sequences.

    A sequence's ``place`` is its order of arrival among all sequences, and negative if it was
    preempted. Its ``urgency`` is its order in its flow: time of arrival, shifted by priority.
    """

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self.preempted = Flow(None)
        self.flows: dict[Share, Flow] = {}
        """Flows by share; none is empty."""
        self._by_digest: dict[str | None, dict[WaitingGroup, None]] = {}
        self._changed: set[str | None] = set()
        """Adapters that sequences have started to wait for since the last `note_resident`."""
        self._resident: Set[str] = frozenset()
        self._count = self._front = self._back = self._turn = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """Preempted sequences, the last one first, then the others in order of arrival."""
        groups = (group for found in self._by_digest.values() for group in found)
        return iter(sorted((s for group in groups for s in group), key=_place))

    def groups(self, digest: str | None) -> Iterable[WaitingGroup]:
        """The groups that wait for an adapter, or for the base."""
        return self._by_digest.get(digest, ())

    def count(self, digest: str | None) -> int:
        """Number of sequences that wait for an adapter, or for the base."""
        return sum(map(len, self.groups(digest)))

    @property
    def keys(self) -> KeysView[str | None]:
        """Weights digests of wanted adapters, and None if sequences of the base wait."""
        return self._by_digest.keys()

    # ------------------------------------------------------------------ wanted adapters

    def wanted(self, count: int, planned: int) -> tuple[list[str], int]:
        """Return weights digests in the order in which to load them, and how many of these the
        first ``count`` sequences use. There are at most ``planned`` digests, or as many as
        those sequences use if that is more.

        Preempted sequences come first. Then flows take turns, each with its adapters in the
        order of their first sequences, so that a flow that waits for many adapters delays only
        itself. A flow's turn ends when a sequence of the adapter at its head starts.
        """
        front, flows = self.preempted, self.flows.values()
        queued = sum(map(len, front.groups.values()))
        used = front.groups_of_first(count)
        near, far = front.in_order[:used], front.in_order[used:]
        firsts = [0] * len(flows)
        if left := max(0, count - queued):
            each = max(1, left // max(1, len(flows)))
            firsts = [flow.groups_of_first(each) for flow in flows]
            turns = list(_in_turns(flows, [0] * len(flows), firsts))
            near, far = near + turns[:left], far + turns[left:]
        distinct = len(self._by_digest) - (None in self._by_digest)
        digests = _digests(near, distinct)
        used = len(digests)
        if used < min(planned, distinct):
            ends = [end + planned for end in firsts]
            groups = chain(near, far, _in_turns(flows, firsts, ends))
            digests = _digests(groups, min(planned, distinct))
        return digests, used

    # ------------------------------------------------------------------ in and out

    def append(self, sequence: Sequence) -> None:
        """Add a sequence that has arrived."""
        self._back += 1
        sequence.place = self._back
        moved = sequence.arrived + PRIORITY_SECONDS * sequence.request.priority
        sequence.urgency = moved, sequence.place
        flow = self.flows.get(sequence.share)
        if flow is None:
            flow = self.flows[sequence.share] = Flow(sequence.share, since=self._next_turn())
        self._join(flow, sequence, sequence.request.priority)

    def appendleft(self, sequence: Sequence) -> None:
        """Add a preempted sequence before all others."""
        self._front -= 1
        sequence.place = self._front
        sequence.urgency = float("-inf"), sequence.place
        self._join(self.preempted, sequence, 0)

    def _join(self, flow: Flow, sequence: Sequence, priority: int) -> None:
        key = sequence.digest, priority
        group = flow.groups.get(key)
        if group is None:
            group = flow.groups[key] = WaitingGroup(
                sequence.digest, None if flow.share is None else flow, priority
            )
            group.turn = self._next_turn()
            self._by_digest.setdefault(sequence.digest, {})[group] = None
        leads = not group.sequences or sequence.urgency < group.order
        if leads and group.sequences:
            flow.take_out(group)
        group.join(sequence)
        if leads:
            flow.put(group)
        self._changed.add(sequence.digest)
        self._count += 1

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def remove(self, sequence: Sequence, now: float | None = None) -> None:
        """Remove a sequence.

        Args:
            now: the time, if the sequence starts; None if it ends.
        """
        key, flow = (sequence.digest, sequence.request.priority), self.flows.get(sequence.share)
        if sequence.place < 0:
            key, flow = (sequence.digest, 0), self.preempted
        assert flow is not None, "a sequence that waits is in a flow"
        group = flow.groups[key]
        if now is not None:
            group.started(sequence, now)
            group.turn = self._next_turn()
            if flow.in_order[0] is group:
                flow.since = group.turn
        leads = group.first is sequence
        if leads:
            flow.take_out(group)
        del group.sequences[sequence.id]
        self._count -= 1
        if group.sequences:
            if leads:
                flow.put(group)
            return
        del flow.groups[key]
        del self._by_digest[sequence.digest][group]
        if not self._by_digest[sequence.digest]:
            del self._by_digest[sequence.digest]
        self._set_ready(flow, group, ready=False)
        if not flow.groups and flow.share is not None:
            del self.flows[flow.share]

    # ------------------------------------------------------------------ adapters

    def note_resident(self, resident: Set[str], now: float) -> None:
        """Record which adapters are resident, to measure waits and mark the ready groups.

        Args:
            resident: the resident ones among the adapters that sequences wait for.
        """
        changed = (resident ^ self._resident) | self._changed
        # Sorted, since a set's order differs from process to process.
        for digest in sorted(changed, key=lambda digest: digest or ""):
            ready = digest is None or digest in resident
            for group in self.groups(digest):
                group.note(ready, now)
                self._set_ready(group.flow or self.preempted, group, ready=ready)
        self._changed.clear()
        self._resident = resident

    def _set_ready(self, flow: Flow, group: WaitingGroup, *, ready: bool) -> None:
        if ready == (group in flow.ready):
            return
        if ready:
            flow.ready[group] = None
        else:
            del flow.ready[group]
        if flow.share is not None and len(flow.ready) == int(ready):
            self._shares.set_runnable(flow.share, ready)


def _merged(groups: Iterable[WaitingGroup]) -> Iterator[Sequence]:
    """The sequences of a flow's groups, in order."""
    found = list(groups)
    if len(found) == 1:
        return iter(found[0])
    return heapq.merge(*found, key=_urgency)


def _in_turns(
    flows: Collection[Flow], begins: list[int], ends: list[int]
) -> Iterator[WaitingGroup]:
    """Yield the first group of each flow, then the second of each, and so on; each flow takes
    part with its groups from its begin to its end."""
    parts = [
        (flow.since, flow.in_order[begin:end])
        for flow, begin, end in zip(flows, begins, ends, strict=True)
    ]
    parts.sort(key=itemgetter(0))
    if len(parts) == 1:
        yield from parts[0][1]
        return
    rank = 0
    while row := [groups[rank] for _, groups in parts if len(groups) > rank]:
        yield from row
        rank += 1


def _digests(groups: Iterable[WaitingGroup], most: int) -> list[str]:
    """Return the first ``most`` distinct adapters of groups, in order."""
    found: dict[str, None] = {}
    for group in groups:
        if len(found) >= most:
            break
        if group.digest is not None:
            found[group.digest] = None
    return list(found)
