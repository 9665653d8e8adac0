"""A lower bound on the time to first token, from the best throughput measured.

A request is refused early only if its deadline could not be met even if every step from
now on were as fast as the fastest one so far. Pure: no torch, no clock.
"""

from __future__ import annotations

from typing import Final

_MARGIN: Final = 0.75
"""Other load on the machine changes step times by 10 to 20 %; a refused deadline must be
out of reach by more than that."""


class StepPace:
    """Observes every step; consulted before a request with a deadline is queued.

    Args:
        chunk: most tokens in one step.

    Attributes:
        tokens_per_s: highest tokens per second of any step so far.
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
        """Lower bound on the seconds to compute ``tokens`` prompt tokens; 0 if nothing is
        known yet.

        Large steps compute more tokens per second than small ones, so a measured rate says
        nothing about work that is far larger than the steps it was measured on. If the work
        is a little larger, its steps are assumed to take no longer than the largest one."""
        full = min(tokens, self._chunk)
        if not tokens or self._largest < min(tokens, self._chunk // 2):
            return 0.0
        return _MARGIN * tokens / self.tokens_per_s * min(1.0, self._largest / full)
