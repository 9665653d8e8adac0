"""How fast uploads are received while sequences run: receiving takes CPU time from the step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from veneer_server.system.machine import usable_cores

BYTES_A_SECOND: Final = 8 << 20
"""For each CPU that the server may use. Measured: docs/measurements/swap-and-churn.md."""

_LOOK_S: Final = 0.05
"""How often a held upload looks whether sequences still run."""


class UploadFlow:
    """Limits the rate of all uploads together while sequences run; without any, they are as
    fast as they can be. Belongs to one event loop.

    Args:
        busy: whether sequences run.
        rate: bytes a second; None for `BYTES_A_SECOND` of each CPU.
    """

    def __init__(self, busy: Callable[[], bool], rate: float | None = None) -> None:
        self._busy = busy
        self._rate = rate or BYTES_A_SECOND * usable_cores()
        self._next = 0.0
        """When the bytes so far have had their time."""

    async def hold(self, count: int) -> float:
        """Wait for as long as ``count`` more bytes take at the rate; returns the seconds."""
        clock = asyncio.get_running_loop().time
        began = now = clock()
        until = self._next = max(now, self._next) + count / self._rate
        while now < until and self._busy():
            await asyncio.sleep(min(_LOOK_S, until - now))
            now = clock()
        if now < until:
            self._next = now  # nothing runs: nobody else is held back, either
        return now - began
