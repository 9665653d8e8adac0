"""How fast uploads are received while sequences run: receiving takes CPU time from the step."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

__all__ = ["BYTES_A_SECOND", "UploadFlow"]

BYTES_A_SECOND: Final = 8 << 20
"""For each CPU that the server may use. Measured: docs/decisions/0063-what-a-swap-costs.md."""

_LOOK_S: Final = 0.05
"""How often a held upload looks whether sequences still run."""


class UploadFlow:
    """Holds uploads back, all of them together, to a rate while sequences run; without them
    they are as fast as they can. Belongs to one event loop.

    Args:
        busy: whether sequences run.
        rate: bytes a second; None for `BYTES_A_SECOND` of each CPU.
    """

    def __init__(self, busy: Callable[[], bool], rate: float | None = None) -> None:
        self._busy = busy
        self._rate = rate or BYTES_A_SECOND * len(os.sched_getaffinity(0))
        self._next = 0.0
        """When what has been received so far is paid for."""

    async def hold(self, count: int) -> float:
        """Wait until another ``count`` bytes have been worth the time; returns the seconds."""
        clock = asyncio.get_running_loop().time
        began = now = clock()
        until = self._next = max(now, self._next) + count / self._rate
        while now < until and self._busy():
            await asyncio.sleep(min(_LOOK_S, until - now))
            now = clock()
        if now < until:
            self._next = now  # nothing runs: nobody else is held back, either
        return now - began
