"""Whether each connection's recent messages arrived in time; see `receiving`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from veneer_server.queues.recent import Recent

__all__ = ["LATE_S", "PAUSE_S", "Standings"]

LATE_S: Final = 10.0
"""How long a connection counts as late."""

PAUSE_S: Final = 0.25
"""How long a connection is not read after it lost a place: its next message may be slow too."""

_KNOWN: Final = 4096
"""Most connections that are remembered."""


@dataclass(slots=True)
class _Standing:
    prompt: bool = False
    late_until: float = 0.0
    paused_until: float = 0.0


_UNKNOWN: Final = _Standing()


class Standings:
    """A connection is *prompt* from the time a message was whole when it was read until one is
    late, and *late* for `LATE_S` after a message that did not arrive in time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: seconds."""
        self._clock = clock
        self._by_peer: Recent[str, _Standing] = Recent(_KNOWN)

    def was_prompt(self, peer: str) -> None:
        """Record a message that was whole when it was read."""
        self._known(peer).prompt = True

    def was_late(self, peer: str, *, displaced: bool) -> None:
        """Record a message that did not arrive in time, and whether it lost its place."""
        known, now = self._known(peer), self._clock()
        known.prompt, known.late_until = False, now + LATE_S
        if displaced:
            known.paused_until = now + PAUSE_S

    def prompt(self, peer: str) -> bool:
        """Whether a message was whole when read, and none has been late since."""
        return self._by_peer.get(peer, _UNKNOWN).prompt

    def late(self, peer: str) -> bool:
        """Whether a message was late within the last `LATE_S`."""
        return self._clock() < self._by_peer.get(peer, _UNKNOWN).late_until

    def may_be_read(self, peer: str, held: int) -> bool:
        """Whether a connection that holds ``held`` places may have another now."""
        known, now = self._by_peer.get(peer, _UNKNOWN), self._clock()
        return now >= known.paused_until and (not held or now >= known.late_until)

    def _known(self, peer: str) -> _Standing:
        known = self._by_peer[peer] = self._by_peer.get(peer) or _Standing()
        return known
