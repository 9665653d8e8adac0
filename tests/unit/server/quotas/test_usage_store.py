"""Usage in SQLite: what survives, what is never counted twice, what is kept for how long."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from veneer_registry.errors import DiskFull, FailedPrecondition, InvalidField
from veneer_registry.records import UploadRequest
from veneer_server.quotas import usage_store
from veneer_server.quotas.stores import TenantStorage
from veneer_server.quotas.usage import DAY_S, UsageBook
from veneer_server.quotas.usage_store import HOUR_S, MAX_DAYS, Batch, UsageCounts, UsageStore

from tests.places import REPOSITORY
from tests.refused import refused


class Nothing:
    """FAKE stores: one tenant, which stores a gibibyte."""

    def tenants(self) -> list[str]:
        return ["a"]

    def stored(self, tenant: str) -> TenantStorage:
        return TenantStorage(1, 1 << 30)

    def adds(self, tenant: str, request: UploadRequest) -> TenantStorage:
        raise NotImplementedError

    def there(self, tenant: str, request: UploadRequest) -> int:
        raise NotImplementedError


class Wall:
    """FAKE wall clock."""

    def __init__(self, now: float = 1000 * HOUR_S) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def book_of(path: Path, clock: Wall, **more: float) -> UsageBook:
    return UsageBook(UsageStore(path), Nothing(), clock=clock, commit_s=3600, **more)


def use(book: UsageBook, tenant: str, tokens: int) -> None:
    book.of(tenant).generated_tokens += tokens
    book.touch(tenant)


async def tokens(
    book: UsageBook,
    tenant: str | None = None,
    start: float | None = None,
    end: float | None = None,
) -> dict[str, int]:
    found = await book.report(tenant, start, end)
    return {name: counts.generated_tokens for name, counts in found.counts.items()}


async def test_counts_survive_and_are_seen_before_they_are_written(tmp_path: Path) -> None:
    clock = Wall()
    book = book_of(tmp_path / "u.db", clock)
    use(book, "a", 3)
    use(book, "b", 5)
    assert await tokens(book) == {"a": 3, "b": 5}
    await book.commit()
    use(book, "a", 1)
    assert await tokens(book) == {"a": 4, "b": 5}
    assert await tokens(book, "a") == {"a": 4}
    await book.stop()
    again = book_of(tmp_path / "u.db", clock)
    assert await tokens(again) == {"a": 4, "b": 5}
    assert (tmp_path / "u.db").stat().st_mode & 0o077 == 0
    await again.stop()


async def test_periods_that_follow_each_other_count_everything_once(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, clock = random.Random(seed), Wall()
    book, total, begin = book_of(tmp_path / "u.db", clock), 0, clock.now
    for _ in range(60):
        count = rng.randint(1, 9)
        use(book, "a", count)
        total += count
        if rng.random() < 0.7:
            await book.commit()  # else it is counted under a later hour
        clock.now += rng.uniform(0, 1.5 * HOUR_S)
    edges = [begin, *sorted(begin + rng.uniform(HOUR_S, clock.now - begin) for _ in range(8))]
    parts = 0
    for start, end in zip(edges, [*edges[1:], None], strict=True):
        if end is not None and end // HOUR_S == start // HOUR_S:
            continue
        parts += (await tokens(book, None, start, end)).get("a", 0)
    assert parts == total == (await tokens(book))["a"]
    with refused(InvalidField, field="start"):
        await book.report(None, clock.now, clock.now + 1)
    await book.stop()


async def test_a_batch_whose_commit_was_reported_as_failed_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Wall()
    book = book_of(tmp_path / "u.db", clock)
    write, failures = UsageStore.write, [True, False, True]

    def failing(store: UsageStore, batch: Batch) -> None:
        """FAKE fault: an error before or after the commit, as a disk may report it."""
        if failures:
            if failures.pop():
                write(store, batch)
            raise DiskFull("full")
        write(store, batch)

    monkeypatch.setattr(UsageStore, "write", failing)
    for n in range(4):
        use(book, "a", 10)
        await book.commit()
        assert await tokens(book) == {"a": 10 * (n + 1)}
    await book.stop()
    assert await tokens(book_of(tmp_path / "u.db", clock)) == {"a": 40}


async def test_a_disk_that_refuses_stops_nothing_and_loses_nothing(tmp_path: Path) -> None:
    book = book_of(tmp_path / "u.db", Wall())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # no file may grow beyond
    try:
        for n in range(500):
            use(book, f"tenant-{n:050d}", 1)
        await book.commit()
        await book.commit()
        assert len(await tokens(book)) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert UsageStore(tmp_path / "u.db").report(None, None, 10**6).counts == {}, "refused"
    use(book, "one more", 1)
    await book.stop()
    found = await tokens(book_of(tmp_path / "u.db", Wall()))
    assert sum(found.values()) == 501


async def test_a_caller_that_leaves_while_it_is_told_disturbs_nothing(tmp_path: Path) -> None:
    book = book_of(tmp_path / "u.db", Wall())
    for n in range(200):
        use(book, f"t{n % 3}", 1)
        asking = asyncio.create_task(book.report(None, None, None))
        await asyncio.sleep(0)
        if n % 2:
            await asyncio.sleep(0.0005)
        asking.cancel()
        await book.commit()
    assert sum((await tokens(book)).values()) == 200
    await book.stop()


def batch(store: UsageStore, hour: int, number: int = 1) -> None:
    counts = UsageCounts(requests=number, adapter_byte_hours=0.5)
    store.write(Batch(store.batch + 1, hour, {"a": counts}, {}))
    store.batch += 1


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "u.db")
    added = {"a": UsageCounts(requests=1), "b": UsageCounts(requests=1 << 70)}
    with pytest.raises(OverflowError):
        store.write(Batch(1, 5, added, {}))
    assert store.report(None, None, 10**6).counts == {}
    store.write(Batch(1, 5, {"a": UsageCounts(requests=2)}, {}))
    assert store.report(None, None, 10**6).counts["a"].requests == 2


def test_old_hours_become_one_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_store, "MAX_HOURS", 10)
    store = UsageStore(tmp_path / "u.db")
    for hour in range(100, 200):
        batch(store, hour)
    found = store.report(None, None, 10**6)
    assert found.counts["a"] == UsageCounts(requests=100, adapter_byte_hours=50.0)
    assert found.oldest == 190
    assert store.report("a", 190, 200).counts["a"].requests == 10
    rows = sqlite3.connect(tmp_path / "u.db").execute("SELECT count(*) FROM usage").fetchone()
    assert rows == (11,)


def test_a_clock_that_jumps_drops_no_hours(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "u.db")
    for hour in (1000, 1001, 10**7, 1002, 3, 1003):
        batch(store, hour)
    assert store.report(None, 1000, 1004).counts["a"].requests == 4
    assert store.report(None, None, 10**8).counts["a"].requests == 6


async def test_usage_of_hours_that_are_gone_is_refused_and_not_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_store, "MAX_HOURS", 3)
    clock = Wall()
    book = book_of(tmp_path / "u.db", clock)
    for _ in range(6):
        use(book, "a", 1)
        await book.commit()
        clock.now += HOUR_S
    with refused(InvalidField, field="start"):
        await book.report(None, 1000 * HOUR_S, None)
    assert await tokens(book, None, 1003 * HOUR_S) == {"a": 3}
    assert await tokens(book) == {"a": 6}
    await book.stop()


@pytest.mark.parametrize("damage", ["torn", "empty", "text", "cut", "no facts", "odd facts"])
async def test_a_damaged_file_is_kept_aside(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "u.db"
    book = book_of(file, Wall())
    for n in range(200):
        use(book, f"tenant-{n:050d}", 1)
    await book.stop()
    data = file.read_bytes()
    match damage:
        case "torn":
            file.write_bytes(data[:5000] + os.urandom(5000) + data[10_000:])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_bytes(b"no database at all" * 100)
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "no facts" | "odd facts":
            sql = (
                "DELETE FROM facts" if damage == "no facts" else "UPDATE facts SET since = 'x'"
            )
            db = sqlite3.connect(file, isolation_level=None)
            db.execute(sql)
            db.close()
    again = book_of(file, Wall())
    use(again, "a", 1)
    assert await tokens(again) == {"a": 1}
    await again.stop()
    aside = [name for name in os.listdir(tmp_path) if "damaged" in name]
    assert len(aside) == (0 if damage == "empty" else 1)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    UsageStore(tmp_path / "u.db").close()
    db = sqlite3.connect(tmp_path / "u.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FailedPrecondition):
        UsageStore(tmp_path / "u.db")


async def test_bytes_uploaded_today_survive_and_a_clock_locks_nobody_out(
    tmp_path: Path,
) -> None:
    clock = Wall(20_000 * DAY_S + 1)
    book = book_of(tmp_path / "u.db", clock)
    book.upload("key:a", 100)
    await book.stop()
    book = book_of(tmp_path / "u.db", clock)
    assert (book.uploaded("key:a"), book.uploaded("key:b")) == (100, 0)
    assert book.day_ends_s == DAY_S - 1
    for jump in (400 * DAY_S, -400 * DAY_S, DAY_S):
        clock.now += jump
        assert book.uploaded("key:a") == 0
        book.upload("key:a", 7)
        clock.now -= jump
        assert book.uploaded("key:a") == 100
    await book.stop()


async def test_old_days_of_uploads_are_forgotten(tmp_path: Path) -> None:
    clock = Wall(20_000 * DAY_S)
    book = book_of(tmp_path / "u.db", clock)
    for _ in range(20):
        book.upload("key:a", 5)
        book.upload("key:b", 5)
        await book.commit()
        clock.now += DAY_S
    clock.now -= 2 * DAY_S
    assert book.uploaded("key:a") == 5
    clock.now -= 10 * DAY_S
    assert book.uploaded("key:a") == 0
    await book.stop()
    assert len(UsageStore(tmp_path / "u.db").uploaded()) == 2 * MAX_DAYS


async def test_stored_bytes_are_charged_by_the_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    book = book_of(tmp_path / "u.db", Wall(), measure_s=3600)
    await book.start()
    now[0] += 1800
    await book.stop()  # measures
    again = book_of(tmp_path / "u.db", Wall())
    found = (await again.report("a", None, None)).counts["a"]
    # float64: one product of exact factors.
    assert found.adapter_byte_hours == (1 << 30) * 0.5
    await again.stop()


_COUNTS = """
import asyncio, sys
from pathlib import Path
from veneer_server.quotas.usage import UsageBook
from veneer_server.quotas.usage_store import UsageStore
from tests.unit.server.quotas.test_usage_store import Nothing, use

async def main():
    book = UsageBook(UsageStore(Path(sys.argv[1])), Nothing(), commit_s=0.02)
    total = 0
    while True:
        use(book, "a", 1)
        total += 1
        print("counted", total, flush=True)
        if total % 7 == 0:
            await book.commit()
            print("committed", total, flush=True)
        await asyncio.sleep(0.0005)

asyncio.run(main())
"""


async def test_kill_9_loses_what_was_not_written_and_counts_nothing_twice(
    tmp_path: Path,
) -> None:
    total = 0
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _COUNTS,
            str(tmp_path / "u.db"),
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        assert process.stdout is not None
        told = {"counted": 0, "committed": 0}

        def read(line: bytes, told: dict[str, int] = told) -> None:
            what, number = line.split()
            told[what.decode()] = int(number)

        while told["committed"] < 20:
            read(await process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = await process.stdout.read()
        await process.wait()
        for line in rest.splitlines(keepends=True):
            if line.endswith(b"\n"):  # else it was cut
                read(line)
        book = book_of(tmp_path / "u.db", Wall(1e10))
        found = (await tokens(book))["a"] - total
        # The line of the last count may have been lost with the process.
        assert told["committed"] <= found <= told["counted"] + 1
        total += found
        await book.stop()
