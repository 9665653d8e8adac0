"""How soon a first token can come: a lower bound from the best that was measured.

A deadline is refused early only where it could not be met even if every step from now
on were as fast as the fastest so far. Pure: no torch, no clock.
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
        fastest_step: seconds of the fastest step so far; 0 before the first.
        tokens_per_s: most tokens a second that a step computed so far.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._largest = 0
        self.fastest_step = 0.0
        self.tokens_per_s = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` (prompt tokens and decode rows) in ``seconds``."""
        if seconds <= 0 or tokens <= 0:
            return
        self.fastest_step = min(self.fastest_step or seconds, seconds)
        self.tokens_per_s = max(self.tokens_per_s, tokens / seconds)
        self._largest = max(self._largest, tokens)

    def seconds(self, tokens: int) -> float:
        """Least seconds until ``tokens`` prompt tokens are computed and one more token
        is there; 0 where nothing is known yet.

        Large steps compute more tokens a second than small ones, so a rate says
        nothing of work that is larger than the steps it was measured on."""
        least = self.fastest_step
        if tokens and self._largest >= min(tokens, self._chunk // 2):
            least = max(least, tokens / self.tokens_per_s)
        return _MARGIN * least
