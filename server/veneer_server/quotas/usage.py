"""Usage of each tenant, counted in memory and committed every few seconds.

Counts only grow. A killed server loses the counts of the last `COMMIT_S` seconds, and those of
stored bytes since the last measurement (`MEASURE_S`); nothing is counted twice.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.logs import get_logger
from veneer_server.quotas.stores import Stores
from veneer_server.quotas.usage_store import HOUR_S, MAX_DAYS, Batch, UsageCounts, UsageStore

COMMIT_S: Final = 5.0
"""Seconds from a count to its commit."""
MEASURE_S: Final = 60.0
"""Seconds between measurements of how much tenants store."""
DAY_S: Final = 86400

_log = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeriodUsage:
    """Usage in a period.

    Attributes:
        counts: counts by tenant.
        start, end: the period, in Unix seconds.
    """

    counts: Mapping[str, UsageCounts]
    start: float
    end: float


class UsageBook:
    """Counts the usage of tenants. Belongs to one event loop; other threads may read `totals`
    and `stored`.

    Attributes:
        totals: each tenant's usage since the server's start.
        stored: bytes that each tenant stored at the last measurement.
    """

    def __init__(
        self,
        store: UsageStore,
        stores: Stores,
        *,
        commit_s: float = COMMIT_S,
        measure_s: float = MEASURE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: clock: Unix seconds. The clock may be set at any time; that changes only the
        hour or day under which usage is counted."""
        self.totals: defaultdict[str, UsageCounts] = defaultdict(UsageCounts)
        self.stored: dict[str, int] = {}
        self._store = store
        self._stores = stores
        self._commit_s = commit_s
        self._measure_s = measure_s
        self._clock = clock
        self._kept: defaultdict[str, UsageCounts] = defaultdict(UsageCounts)
        """The part of the totals that is in the store or in the waiting batch."""
        self._changed: set[str] = set()
        self._uploaded = store.uploaded()
        self._uploaded_changed: set[tuple[int, str]] = set()
        self._upload_day = -1
        """Day of the last upload."""
        self._number = store.batch
        self._waits: Batch | None = None
        """The batch that is being written, or could not be written yet."""
        self._turn = asyncio.Lock()
        # One thread of its own: the store finishes its work even if the caller leaves.
        self._thread = ThreadPoolExecutor(1, "usage")
        self._timer: asyncio.TimerHandle | None = None
        self._commits: set[asyncio.Task[None]] = set()
        self._measuring: asyncio.Task[None] | None = None
        self._measured = time.monotonic()
        self._failing = self._stopped = False

    # ------------------------------------------------------------------- counting

    def of(self, tenant: str) -> UsageCounts:
        """A tenant's counts. Add to them, then call `touch`."""
        return self.totals[tenant]

    def touch(self, tenant: str) -> None:
        """Note that a tenant's counts have changed."""
        self._changed.add(tenant)
        if self._timer is None:
            self._schedule()

    def uploaded(self, account: str) -> int:
        """Bytes that an account has uploaded today."""
        return self._uploaded.get((self._day(), account), 0)

    def upload(self, account: str, size: int) -> None:
        """Count bytes that an account has uploaded."""
        key = (day := self._day(), account)
        if day != self._upload_day:
            self._forget_days(day)
        self._uploaded[key] = self._uploaded.get(key, 0) + size
        self._uploaded_changed.add(key)
        if self._timer is None:
            self._schedule()

    def _forget_days(self, now: int) -> None:
        """Forget older days, as the store does."""
        self._upload_day = now
        days = sorted({day for day, _ in self._uploaded} | {now})
        for key in [key for key in self._uploaded if key[0] in days[:-MAX_DAYS]]:
            del self._uploaded[key]
            self._uploaded_changed.discard(key)

    @property
    def day_ends_s(self) -> float:
        """Seconds until the next day (UTC)."""
        return DAY_S - self._clock() % DAY_S

    def _day(self) -> int:
        return max(0, int(self._clock() // DAY_S))

    def _hour(self) -> int:
        return max(0, int(self._clock() // HOUR_S))

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to measure stored bytes."""
        await self._measure()
        self._measuring = asyncio.create_task(self._keep_measuring())

    async def stop(self) -> None:
        """Commit everything, and close the store. Nothing may be counted after this."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait({self._measuring})
        await asyncio.gather(*self._commits)
        await self._measure()
        await self.commit()
        await self._in_thread(self._store.close)
        self._thread.shutdown()

    async def commit(self) -> None:
        """Write the counts so far. On a disk error, try again later."""
        async with self._turn:
            while self._waits is not None or self._changed or self._uploaded_changed:
                if self._waits is None:
                    self._waits = self._batch()
                try:
                    await self._in_thread(self._store.write, self._waits)
                except (VeneerError, sqlite3.Error, OSError) as error:
                    if not self._failing:
                        _log.error("usage could not be written yet", error)
                    self._failing = True
                    self._schedule()
                    return
                self._waits, self._failing = None, False

    async def report(
        self, tenant: str | None, start: float | None, end: float | None
    ) -> PeriodUsage:
        """Return the usage in a period of whole hours (UTC), including uncommitted counts.

        Args:
            tenant: None for all.
            start, end: Unix seconds, rounded down to the hour, so that consecutive periods
                count everything once; None for the first count, and for now.

        Raises:
            InvalidField: the period is empty, or begins before the first hour that is kept.
        """
        now = self._clock()
        first = None if start is None else max(0, int(start // HOUR_S))
        last = self._hour() + 1 if end is None else max(0, int(end // HOUR_S))
        if first is not None and first >= last:
            raise InvalidField(
                "the period is shorter than an hour: start and end are rounded down to the "
                "hour",
                metadata={"field": "start"},
            )
        async with self._turn:
            found = await self._in_thread(self._store.report, tenant, first, last)
            if first is not None and found.oldest is not None and first < found.oldest:
                hour = time.gmtime(found.oldest * HOUR_S)
                oldest = time.strftime("%Y-%m-%dT%H:00:00Z", hour)
                raise InvalidField(
                    f"hourly usage starts at {oldest}: use that as the start, or leave the "
                    "start unset",
                    metadata={"field": "start", "oldest": oldest},
                )
            counts = found.counts
            if first is None or first <= self._hour() < last:
                self._add_uncommitted(counts, tenant, found.batch)
        return PeriodUsage(
            counts,
            self._store.since if first is None else float(first * HOUR_S),
            now if end is None else float(last * HOUR_S),
        )

    # ---------------------------------------------------------------------- parts

    def _add_uncommitted(
        self, counts: dict[str, UsageCounts], tenant: str | None, batch: int
    ) -> None:
        waits = self._waits
        found = [] if waits is None or waits.number <= batch else [*waits.added.items()]
        found += [(name, self.totals[name] - self._kept[name]) for name in self._changed]
        for name, more in found:
            if tenant in (None, name):
                counts[name] = counts.get(name, UsageCounts()) + more

    def _batch(self) -> Batch:
        added = {name: self.totals[name] - self._kept[name] for name in self._changed}
        for name in self._changed:
            self._kept[name] = replace(self.totals[name])
        uploaded = {key: self._uploaded[key] for key in self._uploaded_changed}
        self._changed.clear()
        self._uploaded_changed.clear()
        self._number += 1
        return Batch(self._number, self._hour(), added, uploaded)

    def _schedule(self) -> None:
        if not self._stopped:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._commit_s, self._due)

    def _due(self) -> None:
        self._timer = None
        task = asyncio.create_task(self.commit())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _keep_measuring(self) -> None:
        while True:
            await asyncio.sleep(self._measure_s)
            await self._measure()

    async def _measure(self) -> None:
        """Measure stored bytes, and count them for the time since the last measurement."""
        try:
            found = await self._in_thread(self._look)
        except Exception as error:  # disk errors must not end the loop
            _log.error("stored bytes are unknown", error)
            return
        now = time.monotonic()
        hours, self._measured = (now - self._measured) / HOUR_S, now
        self.stored = found
        for tenant, size in found.items():
            if size:
                self.of(tenant).adapter_byte_hours += size * hours
                self._changed.add(tenant)
                if self._timer is None:
                    self._schedule()

    def _look(self) -> dict[str, int]:
        return {tenant: self._stores.stored(tenant).bytes for tenant in self._stores.tenants()}
