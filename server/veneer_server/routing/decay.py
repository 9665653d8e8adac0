"""Sums whose older terms count less, without updating every term as time passes.

Forward decay (Cormode et al. 2009): a new term is multiplied by e^(age of the sum / window),
instead of dividing all old terms by it. Only ratios of such sums have a meaning.
"""

from __future__ import annotations

import heapq
import math
from operator import itemgetter
from typing import Final

_LARGEST: Final = 1e60
_MOST_WINDOWS: Final = 500.0


class Decay:
    """The weight of a term that is added now.

    Args:
        window_s: a term this many seconds ago counts 1 / e.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._began: float | None = None

    def weight(self, now: float) -> float:
        """Weight of a term added now, relative to earlier terms."""
        if self._began is None:
            self._began = now
        # After a long silence old terms count nothing, whatever their exact weight.
        return math.exp(min(_MOST_WINDOWS, max(0.0, now - self._began) / self._window_s))

    def restart(self, now: float) -> float | None:
        """If weights have become large, start again and return the number by which all sums
        must be divided before the next term; else None."""
        weight = self.weight(now)
        if weight < _LARGEST:
            return None
        self._began = now
        return weight


class Popularity:
    """Each key's share of recent requests.

    Args:
        most: maximum number of keys; beyond it, those with the smallest shares are
            forgotten.
    """

    def __init__(self, window_s: float, most: int = 1 << 17) -> None:
        self._decay = Decay(window_s)
        self._counts: dict[str, float] = {}
        self._total = 0.0
        self._most = most

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, key: str, now: float) -> float:
        """Count a request for a key. Returns a lower bound of the key's share: two standard
        deviations below its share of the counted requests."""
        if (over := self._decay.restart(now)) is not None:
            self._counts = {key: count / over for key, count in self._counts.items()}
            self._total /= over
        weight = self._decay.weight(now)
        count = self._counts[key] = self._counts.get(key, 0.0) + weight
        self._total += weight
        if len(self._counts) > self._most:
            kept = heapq.nlargest(self._most // 2, self._counts.items(), key=itemgetter(1))
            self._counts = dict(kept)
        seen = count / weight
        return max(0.0, seen - 2 * math.sqrt(seen)) * weight / self._total
