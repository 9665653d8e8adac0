"""Search for the highest rate that keeps the limits: double the rate until it breaks them, then
bisect.

Each rate is a separate open loop. A closed loop could not find the highest rate, because it
slows down with the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from veneer_loadtest.results import Level, Probe

HIGHEST: Final = 100_000.0
"""Requests per second at which the search stops even if no limit was broken."""

_LOWEST: Final = 100
"""The search gives up below the first rate divided by this."""

Tried = Callable[[float], Awaitable[Level | None]]
"""Function that sends a load at a rate; if it returns None, the search ends."""


def keeps(level: Level, share: float) -> bool:
    """Return whether at least ``share`` of the requests kept the limits; False if none
    succeeded."""
    return level.slo is not None and level.slo.share >= share and level.requests.ok > 0


async def find_max(
    attempt: Tried, *, begin: float, share: float, precision: float
) -> tuple[list[Probe], float, bool]:
    """Search from ``begin`` requests a second.

    Args:
        share: share of the requests that must keep the limits.
        precision: the search ends when the lowest rate that broke the limits is at most
            this much (0.1: 10 %) above the highest that kept them.

    Returns:
        the rates tried, in order; the highest rate that kept the limits (0: none did);
        whether a higher rate broke them.
    """
    probes: list[Probe] = []
    good, bad = 0.0, HIGHEST
    rate = begin
    while rate < HIGHEST:
        level = await attempt(rate)
        if level is None:
            break
        kept = keeps(level, share)
        probes.append(Probe(rate=rate, kept=kept, level=level))
        if kept:
            good = rate
        else:
            bad = rate
        if bad == HIGHEST:
            rate = 2 * good
        elif good == 0.0:
            if bad < begin / _LOWEST:
                break
            rate = bad / 2
        elif bad <= good * (1 + precision):
            break
        else:
            rate = (good * bad) ** 0.5
    return probes, good, bad < HIGHEST
