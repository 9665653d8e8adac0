"""Calls that last, such as watches: they end once their caller would not be let in any more.

A key may be revoked, moved to another tenant or given fewer roles, and keys, tokens and
certificates expire. While such calls are open, one timer for all of them looks every second
whether the keys have changed, and at the wall clock, which may be set.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Final

from veneer_registry.errors import PermissionDenied, Unauthenticated, VeneerError

from veneer_server.access.principal import Principal

ENDED: Final = "ended"
"""Metadata of an error that ends a call which had been let in."""

LOOK_S: Final = 1.0
MOST_PUT_OFF: Final = 3
"""Looks in a row that wait for the keys: after a clock was set back, a file seems to be written
for hours."""
_BATCH: Final = 16
"""Calls that are checked before other work gets a turn: a token takes 0.1 ms and more."""

Check = Callable[[], Awaitable[Principal]]
"""Lets a call in again. Raises as `Access.admit`."""


@dataclass(slots=True, eq=False)
class _Open:
    """An open call.

    Attributes:
        principal: who it was let in as.
        keys: what was known of keys then.
        cancelling: of its task, when it was opened.
        why: it ends by this.
    """

    check: Check
    principal: Principal
    keys: tuple[object, ...]
    task: asyncio.Task[Any]
    cancelling: int
    why: VeneerError | None = None


class Lasting:
    """Belongs to one event loop.

    Args:
        keys: what is known of keys; the same objects as long as nothing has changed, since
            comparing thousands of keys for each call would hold up the event loop.
        refresh: brings that up to date. Returns False while it may be about to change again.
    """

    def __init__(
        self, keys: Callable[[], tuple[object, ...]], refresh: Callable[[], Awaitable[bool]]
    ) -> None:
        self._keys = keys
        self._refresh = refresh
        self.calls: set[_Open] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._checking: asyncio.Task[None] | None = None
        self._put_off = 0
        """Looks since the last that counted."""

    @contextmanager
    def call(self, principal: Principal, check: Check) -> Iterator[None]:
        """Holds an open call, which has just been let in.

        Raises:
            Unauthenticated, PermissionDenied: it would not be let in any more (metadata
                `ENDED`). The block was cancelled; what it had begun may have taken effect.
        """
        task = asyncio.current_task()
        assert task is not None, "calls are answered in tasks"
        call = _Open(check, principal, self._keys(), task, task.cancelling())
        self.calls.add(call)
        if self._timer is None:
            self._look_later()
        try:
            yield
        except asyncio.CancelledError:
            if call.why is not None and task.uncancel() <= call.cancelling:
                raise call.why from None
            raise
        finally:
            self.calls.discard(call)

    def _look_later(self) -> None:
        # In a context of its own: it is no part of the call that happens to start it.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK_S, self._look, context=Context())

    def _look(self) -> None:
        self._timer = None
        if not self.calls:
            return  # the next call starts it again
        self._look_later()
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self.look())

    async def look(self) -> None:
        if not await self._refresh() and self._put_off < MOST_PUT_OFF:
            self._put_off += 1
            return
        self._put_off = 0
        keys, now = self._keys(), time.time()
        due = [
            call
            for call in self.calls
            if call.why is None and (call.principal.until <= now or not _same(call.keys, keys))
        ]
        for number, call in enumerate(due, 1):
            why = await _refusal(call)
            if why is None:
                call.keys = keys
            elif call in self.calls:
                call.why = type(why)(why.message, metadata={**why.metadata, ENDED: "true"})
                call.task.cancel()
            if number % _BATCH == 0:
                await asyncio.sleep(0)


def _same(before: tuple[object, ...], now: tuple[object, ...]) -> bool:
    return all(one is other for one, other in zip(before, now, strict=True))


async def _refusal(call: _Open) -> VeneerError | None:
    """Why a call may not go on; None if it may."""
    try:
        now = await call.check()
    except (Unauthenticated, PermissionDenied) as error:
        return error
    except VeneerError:
        return None  # nobody knows, as while the issuer of tokens is away
    if now.tenant != call.principal.tenant:
        return Unauthenticated(
            "this credential now belongs to a different tenant than when the call began: "
            "call again",
            metadata={"cause": "tenant"},
        )
    call.principal = now
    return None
