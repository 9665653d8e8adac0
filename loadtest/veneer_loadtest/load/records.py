"""The result of each request, as workers report it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Literal

import msgspec

Outcome = Literal["ok", "left", "failed", "stopped"]
"""``left``: the caller cancelled, as planned; ``stopped``: the run ended before the request."""


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One request. Times are seconds after the load's start.

    Attributes:
        due_s: when it was due to be sent. Latencies count from here, not from ``sent_s``: a
            user would wait for the delay of a late generator too.
        first_s: when its first token arrived; None: never.
        end_s: when its answer ended, it failed, or its caller left.
        prompt_tokens: as counted by the server, or the planned number if it does not say.
        cached: prompt tokens found in the prefix cache; 0 if the server does not say.
        tokens: new tokens that arrived.
        reason: reason of a failure: the server's, or ``TIMEOUT`` ...; "" without a failure.
        tier: tier in which the server found the adapter (``device`` ...); "" for the base,
            or if the server does not say.
        queue_s, load_s: as reported by the server; None if it does not report them.
        gaps: seconds between one arrival and the next, as 32-bit floats.
    """

    index: int
    adapter: str
    due_s: float
    sent_s: float
    first_s: float | None
    end_s: float
    prompt_tokens: int
    cached: int
    tokens: int
    outcome: Outcome
    reason: str = ""
    tier: str = ""
    revision: str = ""
    queue_s: float | None = None
    load_s: float | None = None
    gaps: bytes = b""

    @property
    def first_token_s(self) -> float | None:
        """Seconds from its due time to its first token."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def whole_s(self) -> float:
        """Seconds from its due time to its end."""
        return self.end_s - self.due_s

    def gap_values(self) -> array[float]:
        """Return the seconds between one arrival and the next."""
        values = array("f")
        values.frombytes(self.gaps)
        return values

    def arrivals_s(self) -> Iterator[float]:
        """Yield when each token arrived; tokens of one message have the same time."""
        if self.first_s is not None:
            yield from accumulate(self.gap_values(), initial=self.first_s)


def pack_gaps(arrivals: list[float]) -> bytes:
    """Return `Record.gaps` for the times at which tokens arrived."""
    return array("f", (b - a for a, b in pairwise(arrivals))).tobytes()
