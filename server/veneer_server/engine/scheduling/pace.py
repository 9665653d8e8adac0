"""How soon a first token can come: a lower bound from the best that was measured.

A deadline is refused early only where it could not be met even if every step from now
on computed as many tokens a second as the best one so far. Pure: no torch, no clock.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Pace"]

_MARGIN: Final = 0.75
"""Steps differ by a tenth or two with what else the machine does; what is refused must
be out of reach by more than that."""


class Pace:
    """Told of every step; asked before a request with a deadline is queued.

    Args:
        chunk: most tokens of one step.

    Attributes:
        tokens_per_s: most tokens a second that a step computed so far.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._largest = 0
        self.tokens_per_s = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` (prompt tokens and decode rows) in ``seconds``."""
        if seconds <= 0 or tokens <= 0:
            return
        self.tokens_per_s = max(self.tokens_per_s, tokens / seconds)
        self._largest = max(self._largest, tokens)

    def seconds(self, tokens: int) -> float:
        """Least seconds until ``tokens`` prompt tokens are computed; 0 where nothing is
        known yet.

        Large steps compute more tokens a second than small ones, so a rate says
        nothing of work that is far larger than the steps it was measured on; where it
        is a little larger, its steps may take no longer than the largest one did."""
        full = min(tokens, self._chunk)
        if not tokens or self._largest < min(tokens, self._chunk // 2):
            return 0.0
        return _MARGIN * tokens / self.tokens_per_s * min(1.0, self._largest / full)
