"""Who of the waiting may start, in what order, and how long anyone can be overtaken.

Order is arrival order, with three exceptions and a bound on each:

* A sequence whose adapter is on its way is passed over: nothing that starts
  meanwhile delays the transfer, and when it ends the sequence is the oldest.
* A sequence whose adapter finds no *room* is passed over for `patience` seconds.
  From then on no younger one's adapter is brought to where the room is missing, and
  nothing younger starts that could keep it taken, so the room comes free when what
  runs now has ended.
* While more are ready than there are places, those go first that add no adapter to
  the batch, since each further adapter makes a step dearer. That ends for a
  sequence `max_wait` seconds after its arrival: from then on, and after a
  preemption, nothing younger starts before it.

So once a sequence is `max_wait` old and its adapter is there, only older ones and
what runs already are before it, and all of them end.
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
        """(adapter, since): the first want that finds no room."""

    @property
    def lacking(self) -> str | None:
        """The first want that finds no room, however short a time that has been so."""
        return self._lacking[0] if self._lacking else None

    def note_lack_of_room(self, digest: str | None, now: float) -> None:
        """Told after each planning of adapters which want finds no room, if any."""
        if digest is None:
            self._lacking = None
        elif self._lacking is None or self._lacking[0] != digest:
            self._lacking = (digest, now)

    def resident(self, sequence: Sequence) -> bool:
        """Its weights are where a step needs them, and stay there."""
        return sequence.digest is None or self._residency.ready(sequence.digest)

    def order(
        self,
        waiting: Iterable[Sequence],
        *,
        in_batch: Collection[str],
        places: int,
        now: float,
    ) -> list[Sequence]:
        """Those that may start now, first to last. The caller must stop at the first
        one that finds no blocks, or younger ones would take what it waits for.

        Args:
            waiting: in order of arrival, preempted ones first.
            in_batch: adapters that run already.
            places: how many more may run.
        """
        ready: list[Sequence] = []
        queue = list(waiting)
        lacking = self.lacking_too_long(now)
        # An operator's want is nobody's in the queue: it is before all of them.
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
        """What it waits for from now on is a place, or its adapter."""
        if not resident and sequence.waiting_since is None:
            sequence.waiting_since = now
        elif resident and sequence.waiting_since is not None:
            sequence.load_seconds += now - sequence.waiting_since
            sequence.waiting_since = None

    def lacking_too_long(self, now: float) -> str | None:
        """The first want that finds no room, if that was so for `patience` seconds."""
        if self._lacking is None or now - self._lacking[1] < self._patience:
            return None
        return self._lacking[0]

    def _keeps_room(self, sequence: Sequence) -> bool:
        """Were it to run, its adapter could not be evicted; one that is pinned where
        sequences use it cannot anyway."""
        digest = sequence.digest
        return digest is not None and not self._residency.pinned(digest, "device")

    def _rank(self, sequence: Sequence, in_batch: Collection[str], now: float) -> int:
        """Lower goes first; equal ones by arrival."""
        preempted = sequence.admitted is not None
        if preempted or now - sequence.arrived >= self._max_wait:
            return 0
        return 1 if sequence.digest is None or sequence.digest in in_batch else 2
