"""The tokens that a sequence contains, with counts updated at every step. No torch.

Penalties depend on the distinct tokens and on how often each was generated. Counting
them in a long text takes milliseconds at each step, for which the whole batch waits; adding
the newest token to the previous counts takes almost no time.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The distinct tokens of a prompt and its output.

    Attributes:
        ids: [distinct] int64.
        counts: [distinct] int64, how often each occurs in the output; 0 for tokens that
            occur only in the prompt.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]

    def after(self, tokens: Sequence[int]) -> Seen:
        """Return the counts after some more tokens of the output."""
        if not tokens:
            return self
        more = Counter(tokens)
        known = [more.pop(token, 0) for token in self.ids.tolist()]
        ids, counts = list(more), list(more.values())
        return Seen(
            np.concatenate((self.ids, np.array(ids, dtype=np.int64))),
            np.concatenate((self.counts + np.array(known), np.array(counts, dtype=np.int64))),
        )


class TokenCounts:
    """Keeps the `Seen` of one sequence up to date as its output grows.

    Attributes:
        generated: number of output tokens added so far.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        different = sorted(set(prompt))
        self.generated = 0
        self._ids = array("q", different)
        self._counts = array("q", bytes(8 * len(different)))
        self._places = {token: place for place, token in enumerate(different)}

    def add(self, output: Iterable[int]) -> None:
        """Add the next tokens of the output."""
        for token in output:
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[place] += 1
            self.generated += 1

    def seen(self) -> Seen:
        """A copy of the counts, which later tokens do not change."""
        return Seen(np.array(self._ids), np.array(self._counts))
