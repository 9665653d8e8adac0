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

from collections.abc import Collection, Iterable

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.sequence import Sequence

__all__ = ["Admission"]


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

    def resident(self, sequence: Sequence) -> bool:
        """Whether the sequence's adapter is where a step needs it, and stays there."""
        return sequence.digest is None or self._residency.ready(sequence.digest)

    def order(
        self,
        waiting: Iterable[Sequence],
        *,
        in_batch: Collection[str],
        places: int,
        now: float,
    ) -> list[Sequence]:
        """Sequences that may start now, in order. The caller must stop at the first one
        that gets no blocks, or younger ones would take the blocks that it waits for.

        Args:
            waiting: in order of arrival, preempted ones first.
            in_batch: adapters of running sequences.
            places: how many more sequences may run.
        """
        ready: list[Sequence] = []
        queue = list(waiting)
        lacking = self.lacking_too_long(now)
        # If no queued sequence has this want, it is an operator's, which precedes them all.
        behind = lacking is not None and all(s.digest != lacking for s in queue)
        for sequence in queue:
            behind = behind or (lacking is not None and sequence.digest == lacking)
            resident = self.resident(sequence)
            self._note_wait(sequence, resident, now)
            if resident and not (behind and self._keeps_room(sequence)):
                ready.append(sequence)
        if len(ready) > places:
            ready.sort(key=lambda s: self._rank(s, in_batch, now))
        return ready

    def _note_wait(self, sequence: Sequence, resident: bool, now: float) -> None:
        """Measure how long the sequence waits for its adapter, rather than for a place."""
        if not resident and sequence.waiting_since is None:
            sequence.waiting_since = now
        elif resident and sequence.waiting_since is not None:
            sequence.load_seconds += now - sequence.waiting_since
            sequence.waiting_since = None

    def lacking_too_long(self, now: float) -> str | None:
        """The oldest want that finds no room, if it has found none for `patience` seconds."""
        if self._lacking is None or now - self._lacking[1] < self._patience:
            return None
        return self._lacking[0]

    def _keeps_room(self, sequence: Sequence) -> bool:
        """Whether running the sequence would prevent its adapter's eviction. An adapter that
        is pinned to DEVICE cannot be evicted anyway."""
        digest = sequence.digest
        return digest is not None and not self._residency.pinned(digest, "device")

    def _rank(self, sequence: Sequence, in_batch: Collection[str], now: float) -> int:
        """Lower goes first; ties in order of arrival."""
        preempted = sequence.admitted is not None
        if preempted or now - sequence.arrived >= self._max_wait:
            return 0
        return 1 if sequence.digest is None or sequence.digest in in_batch else 2
