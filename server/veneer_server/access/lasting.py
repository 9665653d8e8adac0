"""Ends long-running calls, such as watches, once their caller would no longer be admitted.

A key may be revoked, moved to another tenant or given fewer roles, and keys, tokens and
certificates expire. While such calls are open, one timer for all of them checks every second
whether the keys have changed, and compares expiry with the wall clock, which may be set.
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
"""Metadata of an error that ends a call that had been admitted."""

LOOK_S: Final = 1.0
MOST_PUT_OFF: Final = 3
"""Most checks in a row that are put off because the keys may be changing: after the clock was
set back, a file looks as if it were being written for hours."""
_BATCH: Final = 16
"""Calls that are checked before other work gets a turn: checking a token takes 0.1 ms or
more."""

Check = Callable[[], Awaitable[Principal]]
"""Admits a call again. Raises as `Access.admit`."""


@dataclass(slots=True, eq=False)
class _Open:
    """An open call.

    Attributes:
        principal: the identity with which it was last admitted.
        keys: the keys that were known then.
        cancelling: `asyncio.Task.cancelling` of its task when it was opened.
        why: the error that ends it, if any.
    """

    check: Check
    principal: Principal
    keys: tuple[object, ...]
    task: asyncio.Task[Any]
    cancelling: int
    why: VeneerError | None = None


class Lasting:
    """Checks open calls, and ends those that would no longer be admitted. Belongs to one event
    loop.

    Args:
        keys: returns the known keys; the same objects as long as nothing has changed, since
            comparing thousands of keys for each call would block the event loop.
        refresh: updates the keys. Returns False while they may be about to change again.
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
        """Checks that were put off since the last one."""

    @contextmanager
    def call(self, principal: Principal, check: Check) -> Iterator[None]:
        """Watch over a call that has just been admitted, while the block runs.

        Raises:
            Unauthenticated, PermissionDenied: it would no longer be admitted (metadata
                `ENDED`). The block was cancelled; changes that it had begun may have taken
                effect.
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
        # In a context of its own: the timer does not belong to the call that starts it.
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
    """Return the error that ends a call; None if it may continue."""
    try:
        now = await call.check()
    except (Unauthenticated, PermissionDenied) as error:
        return error
    except VeneerError:
        return None  # cannot be decided now, for example while the token issuer is unreachable
    if now.tenant != call.principal.tenant:
        return Unauthenticated(
            "this credential now belongs to a different tenant than when the call began: "
            "call again",
            metadata={"cause": "tenant"},
        )
    call.principal = now
    return None
