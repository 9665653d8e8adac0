"""Tracks running calls, and admits new ones by phase: loading, serving, draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Final

from veneer_registry.errors import Draining, ModelLoading

__all__ = ["READER_LIMIT_S", "Calls", "Phase"]

READER_LIMIT_S: Final = 30.0
"""Default limit on how long a caller may take to send or read a message."""

_CANCEL_WAIT_S: Final = 2.0

_QUIET_S, _QUIET_MOST_S = 0.1, 1.0
"""A drain ends when no call has arrived for `_QUIET_S` since calls are refused, or after
`_QUIET_MOST_S`. gRPC hands calls over one by one; those that it still has when it is stopped
end with CANCELLED, which clients do not retry, instead of UNAVAILABLE."""


class Phase(Enum):
    """What the server does with a new call."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Calls:
    """Admits calls by phase and tracks the running ones, so that a drain can end them.

    Belongs to one event loop. Every call runs inside `running`, in its own task.
    """

    def __init__(self, doing: Callable[[], str] = str) -> None:
        """Args: doing: describes what is being loaded; may return an empty string."""
        self.doing = doing
        self._phase = Phase.LOADING
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut_off = False
        self._arrived = float("-inf")

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def count(self) -> int:
        """Calls running now."""
        return len(self._tasks)

    def serve(self) -> None:
        """Admit calls from now on, unless the server is already draining."""
        if self._phase is Phase.LOADING:
            self._phase = Phase.SERVING

    def check_phase(self) -> None:
        """To be asked for each call as it arrives.

        Raises:
            ModelLoading, Draining: the phase admits no call.
        """
        self._arrived = time.monotonic()
        if self._phase is Phase.LOADING:
            doing = self.doing()
            raise ModelLoading(
                f"the server is still loading{f' ({doing})' if doing else ''}: retry in a few "
                "seconds",
                metadata={"doing": doing} if doing else None,
                retry_after_s=1.0,
            )
        if self._phase is Phase.DRAINING:
            raise Draining(
                "the server is stopping: retry on another server, or when it has restarted",
                retry_after_s=1.0,
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the current task as a call while the block runs.

        Raises:
            ModelLoading, Draining: the phase admits no call.
        """
        self.check_phase()
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._cut_off:
                raise Draining(
                    "the server stopped before this request was finished: send it again, "
                    "or start the server with a larger --grace",
                    retry_after_s=1.0,
                ) from None
            raise
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    def drain(self) -> None:
        """Admit no new calls from now on; running calls continue."""
        self._phase = Phase.DRAINING
        self._arrived = time.monotonic()  # those on their way have not been seen yet

    async def finish(self, grace_s: float) -> int:
        """Wait for running calls, then cancel the rest; then refuse the calls that are on their
        way. Returns how many were cancelled."""
        cancelled = await self._finish_running(grace_s)
        give_up = time.monotonic() + _QUIET_MOST_S
        # The end of events is no event.
        while (left := min(self._arrived + _QUIET_S, give_up) - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        return cancelled

    async def _finish_running(self, grace_s: float) -> int:
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
            return 0
        except TimeoutError:
            pass
        self._cut_off = True
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=_CANCEL_WAIT_S)
        return len(rest)
