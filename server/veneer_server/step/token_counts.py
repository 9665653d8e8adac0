"""Which tokens a sequence has had, kept up from step to step. No torch.

A penalty is of different tokens and of how often each was put out. To find them in
the whole text takes milliseconds for a long one, at each step and for everybody in
the batch; to add the newest token to what was found before takes none.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Seen", "TokenCounts"]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The different tokens of a prompt and its output.

    Attributes:
        ids: [different] int64.
        counts: [different] int64, how often the output has each; 0 for one that only
            the prompt has.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]


class TokenCounts:
    """What is `Seen` of one sequence, while its output grows.

    Attributes:
        generated: tokens of the output that were added.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        different = sorted(set(prompt))
        self.generated = 0
        self._ids = array("q", different)
        self._counts = array("q", bytes(8 * len(different)))
        self._places = {token: place for place, token in enumerate(different)}

    def add(self, output: Iterable[int]) -> None:
        """Take in the next tokens of the output."""
        for token in output:
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[place] += 1
            self.generated += 1

    def seen(self) -> Seen:
        """A copy: what is added later does not change it."""
        return Seen(np.array(self._ids), np.array(self._counts))
