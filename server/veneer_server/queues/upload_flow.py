"""Limits uploads while sequences run, since receiving takes CPU time from the step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from veneer_server.system.machine import usable_cores

BYTES_A_SECOND: Final = 8 << 20
"""Rate for each CPU that the server may use. Measured: docs/measurements/swap-and-churn.md."""

_LOOK_S: Final = 0.05
"""Seconds between a held upload's checks whether sequences still run."""


class UploadFlow:
    """Limits the total rate of all uploads while sequences run; otherwise uploads are not
    limited. Belongs to one event loop.

    Args:
        busy: whether sequences run.
        rate: bytes per second; None for `BYTES_A_SECOND` for each CPU.
    """

    def __init__(self, busy: Callable[[], bool], rate: float | None = None) -> None:
        self._busy = busy
        self._rate = rate or BYTES_A_SECOND * usable_cores()
        self._next = 0.0
        """Time until which the bytes so far use up the rate."""

    async def hold(self, count: int) -> float:
        """Wait for as long as ``count`` more bytes take at the rate; return the seconds."""
        clock = asyncio.get_running_loop().time
        began = now = clock()
        until = self._next = max(now, self._next) + count / self._rate
        while now < until and self._busy():
            await asyncio.sleep(min(_LOOK_S, until - now))
            now = clock()
        if now < until:
            self._next = now  # nothing runs, so other uploads need not wait either
        return now - began
