"""The database of stored responses: what it keeps, what goes, and what no fault may do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from veneer_registry.errors import (
    DiskFailed,
    DiskFull,
    FailedPrecondition,
    InvalidField,
    QueueFull,
)
from veneer_server.openai import response_store as stored_module
from veneer_server.openai.errors import HttpError
from veneer_server.openai.response_store import (
    MAX_HISTORY,
    MAX_READ,
    FinishedResponse,
    ItemPage,
    ResponseDatabase,
    StoredItem,
    StoredResponses,
)
from veneer_server.telemetry.metrics import Metrics

from tests.refused import refused

AGE_S = 100.0
MOST = 1 << 18


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def opened(
    folder: Path, clock: Clock | None = None, most_bytes: int = MOST
) -> Iterator[ResponseDatabase]:
    found = ResponseDatabase(
        folder / "responses.sqlite", most_bytes=most_bytes, age_s=AGE_S, clock=clock or Clock()
    )
    with closing(found):
        yield found


@pytest.fixture
def database(tmp_path: Path, clock: Clock) -> Iterator[ResponseDatabase]:
    with opened(tmp_path, clock) as found:
        yield found


def an_item(name: str, text: str = "") -> StoredItem:
    return StoredItem(name, json.dumps({"id": name, "text": text}).encode())


def finished(
    name: str, *, after: str | None = None, within: str | None = None, text: str = ""
) -> FinishedResponse:
    return FinishedResponse(
        id=name,
        previous=after,
        conversation=within,
        head=json.dumps({"id": name, "status": "completed"}).encode(),
        input=[an_item(f"{name}-asks", text)],
        output=[an_item(f"{name}-says")],
    )


def ids(items: bytes) -> list[str]:
    found = json.loads(items)
    return [item["id"] for item in (found["data"] if isinstance(found, dict) else found)]


def stored(database: ResponseDatabase, tenant: str, names: list[str]) -> list[str]:
    return [name for name in names if database.response(tenant, name) is not None]


# ----------------------------------------------------------------------------- chains


def test_a_response_comes_back_with_its_output(database: ResponseDatabase) -> None:
    assert database.put("a", finished("r1"))
    found = database.response("a", "r1")
    assert found is not None
    assert json.loads(found) == {
        "id": "r1",
        "status": "completed",
        "output": [{"id": "r1-says", "text": ""}],
    }
    assert database.response("a", "r2") is None


def test_a_chain_is_told_oldest_first_and_may_branch(database: ResponseDatabase) -> None:
    database.put("a", finished("r1"))
    database.put("a", finished("r2", after="r1"))
    database.put("a", finished("left", after="r2"))
    database.put("a", finished("right", after="r1"))
    assert ids(database.history("a", "left")) == [
        "r1-asks",
        "r1-says",
        "r2-asks",
        "r2-says",
        "left-asks",
        "left-says",
    ]
    assert ids(database.history("a", "right")) == [
        "r1-asks",
        "r1-says",
        "right-asks",
        "right-says",
    ]


def test_what_is_deleted_is_gone_but_not_for_those_that_continue_it(
    database: ResponseDatabase,
) -> None:
    database.put("a", finished("r1"))
    database.put("a", finished("r2", after="r1"))
    database.put("a", finished("r3", after="r2"))
    before = ids(database.history("a", "r3"))
    assert database.delete("a", "r2")
    assert not database.delete("a", "r2")
    assert database.response("a", "r2") is None
    with pytest.raises(HttpError) as gone:
        database.history("a", "r2")
    assert (gone.value.status, gone.value.code) == (404, "previous_response_not_found")
    with pytest.raises(HttpError):
        database.input_items("a", "r2", ItemPage())
    assert ids(database.history("a", "r3")) == before
    assert not database.put("a", finished("r4", after="r2")), "it would begin in the middle"
    assert database.count == 2
    for name in ("r1", "r3"):
        assert database.delete("a", name)
    assert database.count == 0
    assert rows(database, "responses") == 0, "nothing is left of the chain"


def rows(database: ResponseDatabase, table: str) -> int:
    with closing(sqlite3.connect(database.path)) as db:
        ((count,),) = db.execute(f"SELECT count(*) FROM {table}")
    return int(count)


def test_random_chains_keep_exactly_what_is_stored(database: ResponseDatabase) -> None:
    """Against a model that keeps a copy of the whole history with each response."""
    rng = random.Random(7)
    model: dict[str, list[str]] = {}
    for number in range(100):
        name = f"r{number}"
        after = rng.choice([None, *list(model)[-5:]]) if model else None
        assert database.put("a", finished(name, after=after))
        model[name] = [*model.get(after or "", []), f"{name}-asks", f"{name}-says"]
        for gone in rng.sample(list(model), k=min(len(model), rng.choice((0, 0, 1, 2)))):
            assert database.delete("a", gone)
            del model[gone]
        for name, items in model.items():
            assert ids(database.history("a", name)) == items
    assert database.count == len(model)
    for name in model:
        database.delete("a", name)
    assert rows(database, "responses") == 0


def test_a_deep_chain_takes_as_much_disk_as_its_items(tmp_path: Path, clock: Clock) -> None:
    """120 responses one after the other: copies of what went before would take 7 MB."""
    with opened(tmp_path, clock, 1 << 30) as database:
        database.put("a", finished("r0", text="x" * 1000))
        for at in range(1, 120):
            database.put("a", finished(f"r{at}", after=f"r{at - 1}", text="x" * 1000))
        assert len(ids(database.history("a", "r119"))) == 240
        assert database.bytes < 600_000
        for at in range(119):
            database.delete("a", f"r{at}")
        assert len(ids(database.history("a", "r119"))) == 240
        database.delete("a", "r119")
        assert rows(database, "responses") == 0


def test_a_history_is_bounded_like_a_body(tmp_path: Path) -> None:
    with opened(tmp_path, most_bytes=64 << 20) as database:
        half = "x" * (MAX_HISTORY // 2)
        database.put("a", finished("r1", text=half))
        database.put("a", finished("r2", after="r1", text=half))
        assert len(ids(database.history("a", "r1"))) == 2
        with refused(InvalidField, field="previous_response_id"):
            database.history("a", "r2")
        assert database.response("a", "r2") is not None


def test_what_references_read_is_bounded(tmp_path: Path) -> None:
    """Each refers to a small item of a large response: what counts is what is read."""
    with opened(tmp_path, most_bytes=64 << 20) as database:
        names = [f"msg_{at:x}_0" for at in range(3)]
        for at, name in enumerate(names):
            large = an_item(f"msg_{at:x}_in0", "x" * MAX_HISTORY)
            response = FinishedResponse(
                f"resp_{at:x}", None, None, b"{}", [large], [an_item(name)]
            )
            assert database.put("a", response)
        found = database.referred("a", [names[0], names[0]])
        assert found == [an_item(names[0]).json] * 2
        with refused(InvalidField, field="input"):
            database.referred("a", names)
        with pytest.raises(HttpError) as missing:
            database.referred("a", [names[0], "msg_0_7"])
        assert missing.value.code == "item_not_found"


def test_input_items_come_in_pages(database: ResponseDatabase) -> None:
    database.put("a", finished("r1"))
    database.put("a", finished("r2", after="r1"))
    every = ["r2-asks", "r1-says", "r1-asks"]
    assert ids(database.input_items("a", "r2", ItemPage())) == every
    oldest = database.input_items("a", "r2", ItemPage(newest=False))
    assert ids(oldest) == every[::-1]
    first = json.loads(database.input_items("a", "r2", ItemPage(limit=2)))
    assert (first["first_id"], first["last_id"]) == ("r2-asks", "r1-says")
    assert first["has_more"]
    rest = json.loads(database.input_items("a", "r2", ItemPage("r1-says", limit=2)))
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["r1-asks"], False)
    with refused(InvalidField, field="after"):
        database.input_items("a", "r2", ItemPage("nosuch"))


# ---------------------------------------------------------------------------- tenants


def test_another_tenants_are_as_if_they_did_not_exist(database: ResponseDatabase) -> None:
    database.put("a", finished("r1"))
    database.begin_conversation("a", "c1", b"{}", [an_item("i1")])

    def told(tenant: str, response: str, conversation: str) -> list[str]:
        found = []
        for call in (
            lambda: database.history(tenant, response),
            lambda: database.input_items(tenant, response, ItemPage()),
            lambda: database.conversation(tenant, conversation),
            lambda: database.conversation_history(tenant, conversation),
            lambda: database.items(tenant, conversation, ItemPage()),
            lambda: database.item(tenant, conversation, "i1"),
            lambda: database.add_items(tenant, conversation, [an_item("i2")], most=None),
            lambda: database.delete_item(tenant, conversation, "i1"),
            lambda: database.describe_conversation(tenant, conversation, b"{}"),
            lambda: database.delete_conversation(tenant, conversation),
            lambda: database.put(tenant, finished("x", within=conversation)),
        ):
            with pytest.raises(HttpError) as error:
                call()
            found.append(f"{error.value.status} {error.value.code} {error.value.message}")
        return found

    theirs = told("b", "r1", "c1")
    absent = [line.replace("r0", "r1").replace("c0", "c1") for line in told("b", "r0", "c0")]
    assert theirs == absent
    assert database.response("b", "r1") is None
    assert not database.delete("b", "r1")
    assert not database.put("b", finished("r2", after="r1"))
    assert ids(database.history("a", "r1")) == ["r1-asks", "r1-says"]
    assert ids(database.conversation_history("a", "c1")) == ["i1"]
    assert database.put("b", finished("r1")), "ids are a tenant's own"


def test_who_stores_most_makes_room(tmp_path: Path, clock: Clock) -> None:
    """A tenant that stores less than its share loses nothing, however much another stores."""
    with opened(tmp_path, clock) as database:
        few = [f"few{at}" for at in range(10)]
        for name in few:
            clock.now += 0.001
            assert database.put("small", finished(name, text="x" * 1000))
        many = [f"many{at}" for at in range(150)]
        for name in many:
            clock.now += 0.001
            assert database.put("big", finished(name, text="x" * 3000))
            assert database.bytes <= MOST
        assert stored(database, "small", few) == few
        left = stored(database, "big", many)
        assert left == many[-len(left) :], "the oldest have gone"
        assert len(left) > 30


# ----------------------------------------------------------------------- bytes and age


def test_nothing_is_lost_below_the_bound_and_nothing_kept_above_it(
    tmp_path: Path, clock: Clock
) -> None:
    names = [f"r{at}" for at in range(350)]
    with opened(tmp_path, clock) as database:
        full = None
        for at, name in enumerate(names):
            clock.now += 0.001
            before = database.bytes
            assert database.put("a", finished(name, text="x" * (at * 37 % 1500)))
            assert database.bytes <= MOST
            if full is None and database.count < at + 1:
                full = before
        assert full is not None
        assert full > MOST - 20_000, "the first went when there was no room for it"
        left = stored(database, "a", names)
        assert left == names[-len(left) :]
        assert len(left) > 100
        assert database.count == len(left)


def test_a_large_one_displaces_many_small_ones(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock, 10 << 20) as database:
        for at in range(120):
            database.put("a", finished(f"r{at}", text="x" * 90_000))
        assert 60 < database.count < 120
        large = "x" * (8 << 20)
        for name in ("big1", "big2"):
            clock.now += 1
            assert database.put("a", finished(name, text=large))
            assert database.response("a", name) is not None
            assert database.bytes <= 10 << 20


def test_one_that_does_not_fit_changes_nothing(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock) as database:
        database.put("a", finished("r1"))
        before = database.bytes
        assert not database.put("a", finished("r2", text="x" * MOST))
        assert not database.put("b", finished("r2", after="r1", text="x" * MOST))
        assert (database.bytes, database.count) == (before, 1)
        assert database.response("a", "r1") is not None
        with refused(DiskFull):
            database.begin_conversation("a", "c1", b"{}", [an_item("i", "x" * MOST)])
        with pytest.raises(HttpError):
            database.conversation("a", "c1")


def test_what_is_too_old_is_gone_at_once_and_removed_later(
    database: ResponseDatabase, clock: Clock
) -> None:
    database.put("a", finished("r1"))
    database.begin_conversation("a", "c1", b"{}", [])
    clock.now += AGE_S - 1
    database.put("a", finished("r2", after="r1"))
    database.begin_conversation("a", "c2", b"{}", [])
    database.add_items("a", "c2", [an_item("i")], most=None)
    clock.now += 2
    assert database.response("a", "r1") is None
    assert not database.delete("a", "r1")
    with pytest.raises(HttpError):
        database.conversation("a", "c1")
    assert len(ids(database.history("a", "r2"))) == 4, "its own history is as old as itself"
    assert ids(database.conversation_history("a", "c2")) == ["i"]
    assert rows(database, "responses") == 2
    while database.upkeep():
        pass
    assert database.count == 2
    clock.now += AGE_S
    while database.upkeep():
        pass
    assert database.count == 0
    assert [rows(database, name) for name in ("responses", "conversations", "items")] == [0] * 3
    assert rows(database, "tenants") == 0


def test_upkeep_removes_so_many_at_once(
    database: ResponseDatabase, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tenants together, so that it holds up no answer for long."""
    # private: the real number would take 100,000 rows
    monkeypatch.setattr(stored_module, "_AT_ONCE", 4)
    for tenant in "abc":
        for at in range(3):
            database.put(tenant, finished(f"r{at}"))
    clock.now += AGE_S + 1
    assert database.upkeep()
    assert database.count == 5


def test_upkeep_is_as_fast_however_much_is_stored(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*args: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*args, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    with opened(tmp_path, clock) as database:

        def upkeep() -> int:
            before = steps
            assert not database.upkeep()
            return steps - before

        database.put("a", finished("r"))
        database.begin_conversation("a", "c", b"{}", [])
        for each in made:
            each.set_progress_handler(step, 1)
        few = upkeep()
        for at in range(30):
            database.put("a", finished(f"r{at}"))
            database.begin_conversation("a", f"c{at}", b"{}", [])
        assert 0 < upkeep() <= few


def test_a_lower_bound_is_reached_step_by_step(tmp_path: Path, clock: Clock) -> None:
    """A start with a lower bound removes nothing itself, and an answer no more than its own
    room."""
    names = [f"r{at}" for at in range(200)]
    with opened(tmp_path, clock, 8 << 20) as database:
        for name in names:
            clock.now += 0.001
            database.put("a", finished(name, text="x" * 3000))
        before = database.bytes
    with opened(tmp_path, clock) as database:
        assert database.bytes == before > MOST
        clock.now += 0.001
        assert database.put("a", finished("new", text="x" * 3000))
        assert MOST < database.bytes <= before
        while database.upkeep():
            pass
        assert database.bytes <= MOST
        left = stored(database, "a", [*names, "new"])
        assert left[-1] == "new"
        assert left == [*names, "new"][-len(left) :]
        assert len(left) > 30


def test_a_file_that_shrank_gives_its_space_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "FREE_PAGES", 64)
    with opened(tmp_path, clock, 64 << 20) as database:
        database.put("a", finished("r1", text="x" * (4 << 20)))
        database.put("a", finished("r2"))
        database.delete("a", "r1")
        while database.upkeep():
            pass
        assert database.response("a", "r2") is not None
    assert (tmp_path / "responses.sqlite").stat().st_size < 1 << 20


# ----------------------------------------------------------------------- conversations


def test_a_conversation_is_its_items_in_order(database: ResponseDatabase) -> None:
    made = database.begin_conversation("a", "c1", b'{"a":"b"}', [an_item("i1")])
    assert database.conversation("a", "c1") == (made, b'{"a":"b"}')
    database.add_items("a", "c1", [an_item("i2"), an_item("i3")], most=None)
    assert database.put("a", finished("r1", within="c1"))
    every = ["i1", "i2", "i3", "r1-asks", "r1-says"]
    assert ids(database.conversation_history("a", "c1")) == every
    assert ids(database.items("a", "c1", ItemPage())) == every[::-1]
    assert ids(database.items("a", "c1", ItemPage("i2", 2, newest=False))) == every[2:4]
    assert ids(database.items("a", "c1", ItemPage("i2"))) == ["i1"]
    database.delete_item("a", "c1", "i2")
    assert ids(database.conversation_history("a", "c1")) == [x for x in every if x != "i2"]
    with pytest.raises(HttpError) as gone:
        database.delete_item("a", "c1", "i2")
    assert gone.value.code == "item_not_found"
    database.describe_conversation("a", "c1", b"{}")
    assert database.conversation("a", "c1") == (made, b"{}")
    with refused(InvalidField, field="previous_response_id"):
        database.history("a", "r1")
    database.delete_conversation("a", "c1")
    assert database.response("a", "r1") is not None, "the response is stored by itself"
    with pytest.raises(HttpError) as missing:
        database.put("a", finished("r2", within="c1"))
    assert missing.value.code == "conversation_not_found"
    assert database.response("a", "r2") is None


def test_a_conversation_is_bounded(database: ResponseDatabase) -> None:
    database.begin_conversation("a", "c1", b"{}", [])
    with refused(InvalidField, field="items"):
        database.add_items("a", "c1", [an_item("i", "x" * 5000)], most=5000)
    assert ids(database.conversation_history("a", "c1")) == []
    many = [an_item(f"i{at}") for at in range(4097)]
    with refused(InvalidField, field="items"):
        database.add_items("a", "c1", many, most=1 << 30)


# ----------------------------------------------------------------------------- faults


def test_a_restart_keeps_all(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock) as database:
        database.put("a", finished("r1"))
        database.put("a", finished("r2", after="r1"))
        database.begin_conversation("a", "c1", b"{}", [an_item("i1")])
        told = database.count, database.bytes
    with opened(tmp_path, clock) as database:
        assert (database.count, database.bytes) == told
        assert len(ids(database.history("a", "r2"))) == 4
        assert ids(database.conversation_history("a", "c1")) == ["i1"]
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o077 == 0, "others read no prompts"


KILLED = """
import sys
from pathlib import Path
from tests.unit.server.openai.test_stored import finished, opened
with opened(Path(sys.argv[1]), most_bytes=4 << 20) as database:
    before = None
    for at in range(100_000):
        assert database.put("a", finished(f"r{at}", after=before, text="x" * 500))
        before = f"r{at}" if at % 50 else None
        print(at, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Killed in the middle of writing, at a point that differs from run to run."""
    most = random.randrange(20, 100)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[4],
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= most:
                break
        child.send_signal(signal.SIGKILL)
        said = [line, *child.stdout.read().split("\n")[:-1]]
    last = int(said[-1])
    with opened(tmp_path, most_bytes=4 << 20) as database:
        names = [f"r{at}" for at in range(last + 1)]
        assert stored(database, "a", names) == names
        for name in names[-3:]:
            assert ids(database.history("a", name))[-1] == f"{name}-says"
        assert database.count in (last + 1, last + 2)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk on which no file can grow: writes fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fails_loses_nothing_that_was_there(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, clock, 64 << 20) as database:
        database.put("a", finished("r1"))
        with no_file_larger_than(1 << 18), refused(DiskFailed):
            database.put("a", finished("r2", after="r1", text="x" * (1 << 20)))
        assert database.response("a", "r2") is None
        assert len(ids(database.history("a", "r1"))) == 2
        assert database.put("a", finished("r2", after="r1", text="x" * (1 << 20)))
        assert database.delete("a", "r1")
        assert len(ids(database.history("a", "r2"))) == 4


async def test_answers_do_not_queue_behind_a_disk_that_hangs(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        stored = StoredResponses(database, Metrics(), limit_s=1.0)
        made: list[str] = []

        def make(name: str) -> FinishedResponse:
            made.append(name)
            return finished(name)

        try:
            with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                assert not await stored.keep("a", lambda: make("r1"))
                second = asyncio.ensure_future(stored.keep("a", lambda: make("r2")))
                await asyncio.sleep(0)
                assert second.done(), "it does not wait for the first"
                assert not second.result()
                assert made == ["r1"]
            await stored.change("a", lambda database: None)
            assert await stored.keep("a", lambda: make("r3"))
        finally:
            await stored.stop()


@pytest.mark.parametrize("kind", ["change", "read"])
async def test_one_tenants_requests_leave_room_for_anothers(tmp_path: Path, kind: str) -> None:
    """Those that wait are bounded by tenant; answers are stored all the same."""
    with opened(tmp_path) as database:
        stored = StoredResponses(database, Metrics())
        go = threading.Event()
        ask = getattr(stored, kind)
        try:
            waiting = [
                asyncio.ensure_future(ask("a", lambda _: go.wait()))
                for _ in range(stored_module.MAX_WAITING)
            ]
            await asyncio.sleep(0)
            with refused(QueueFull):
                await ask("a", lambda _: None)
            told = asyncio.ensure_future(stored.read("a", lambda _: "told", changed=True))
            kept = asyncio.ensure_future(stored.keep("a", lambda: finished("r1")))
            other = asyncio.ensure_future(ask("b", lambda _: "b"))
            await asyncio.sleep(0)
            go.set()
            assert await other == "b"
            assert await kept
            assert await told == "told"
            await asyncio.gather(*waiting)
            assert await ask("a", lambda _: "a") == "a"
        finally:
            go.set()
            await stored.stop()


async def test_answers_go_before_changes_that_wait(tmp_path: Path) -> None:
    """A conversation of 4 MiB takes a third of a second: ten of them, and an answer that
    waited for them would not be stored in time."""
    with opened(tmp_path) as database:
        stored = StoredResponses(database, Metrics())
        go = threading.Event()
        order: list[str] = []

        def make() -> FinishedResponse:
            order.append("answer")
            return finished("r1")

        try:
            first = asyncio.ensure_future(stored.change("a", lambda _: go.wait()))
            others = [
                asyncio.ensure_future(stored.change("a", lambda _: order.append("change")))
                for _ in range(3)
            ]
            await asyncio.sleep(0)
            kept = asyncio.ensure_future(stored.keep("a", make))
            await asyncio.sleep(0)
            go.set()
            assert await kept
            await asyncio.gather(first, *others)
        finally:
            go.set()
            await stored.stop()
        assert order == ["answer", "change", "change", "change"]


async def test_many_short_writes_are_no_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that waited too long behind them is not stored; the next one tries again."""
    fake = SimpleNamespace(monotonic=lambda: 7.0)  # each write has only just begun
    monkeypatch.setattr(stored_module, "time", fake)
    with opened(tmp_path) as database:
        stored = StoredResponses(database, Metrics(), limit_s=0.05)
        go = threading.Event()
        try:
            waiting = asyncio.ensure_future(stored.change("a", lambda _: go.wait()))
            await asyncio.sleep(0)
            assert not await stored.keep("a", lambda: finished("r1"))
            second = asyncio.ensure_future(stored.keep("a", lambda: finished("r2")))
            await asyncio.sleep(0)
            assert not second.done()
            go.set()
            await asyncio.gather(waiting, second)
        finally:
            go.set()
            await stored.stop()


async def test_answers_that_are_being_sent_are_bounded(tmp_path: Path) -> None:
    """By slow readers of large ones; short ones always have room."""
    with opened(tmp_path) as database:
        stored = StoredResponses(database, Metrics())
        try:
            with stored.sending("a", MAX_READ // 2):
                with refused(QueueFull), stored.sending("a", 1 << 20):
                    pass
                with stored.sending("a", 60_000):
                    pass
            with stored.sending("a", 1 << 20):
                pass
        finally:
            await stored.stop()


def test_a_damaged_file_is_moved_aside(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "responses.sqlite"
    with opened(tmp_path, clock) as database:
        database.put("a", finished("r1"))
    for end in ("-wal", "-shm"):
        (tmp_path / f"responses.sqlite{end}").unlink(missing_ok=True)
    path.write_bytes(os.urandom(8192))
    with opened(tmp_path, clock) as database:
        assert database.response("a", "r1") is None
        assert database.put("a", finished("r1"))
    assert [each.name for each in tmp_path.glob("responses.sqlite.damaged-*")]


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "responses.sqlite")) as db:
        db.execute("PRAGMA user_version = 99")
    with refused(FailedPrecondition), opened(tmp_path):
        pass
    assert not list(tmp_path.glob("*.damaged-*"))


def test_no_statement_scans_what_is_stored(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes by an index: a start or an answer takes as long with a million responses."""
    said: list[str] = []
    connect = sqlite3.connect

    def listening(*args: Any, **options: Any) -> sqlite3.Connection:
        made = connect(*args, **options)
        made.set_trace_callback(said.append)
        return made

    monkeypatch.setattr(sqlite3, "connect", listening)
    with opened(tmp_path, clock) as database:
        use_all(database, clock)
    steps: set[str] = set()
    with closing(connect(tmp_path / "responses.sqlite")) as db:
        for sql in said:
            if sql.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
                plan = {row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")}
                # A chain is bounded, and there are few tenants.
                if "WITH RECURSIVE" not in sql and "FROM tenants" not in sql:
                    steps |= plan
    assert any("responses_by_age" in step for step in steps)
    reading_all = ("SCAN", "USE TEMP B-TREE")
    assert {step for step in steps if step.startswith(reading_all)} == set()


def use_all(database: ResponseDatabase, clock: Clock) -> None:
    """Call whatever a server calls."""
    for at in range(3):
        database.put("a", finished(f"r{at}", after=f"r{at - 1}" if at else None))
    database.response("a", "r2")
    database.history("a", "r2")
    database.input_items("a", "r2", ItemPage())
    database.begin_conversation("a", "c1", b"{}", [an_item("i1"), an_item("i2")])
    database.put("a", finished("r3", within="c1"))
    database.add_items("a", "c1", [an_item("i3")], most=None)
    database.items("a", "c1", ItemPage("i1"))
    database.items("a", "c1", ItemPage("i1", newest=False))
    database.item("a", "c1", "i1")
    database.conversation_history("a", "c1")
    database.describe_conversation("a", "c1", b"{}")
    database.delete_item("a", "c1", "i1")
    database.delete("a", "r1")
    for at in range(100):
        database.put("a", finished(f"s{at}", text="x" * 3000))
    clock.now += 2 * AGE_S
    while database.upkeep():
        pass
    database.begin_conversation("a", "c2", b"{}", [])
    database.delete_conversation("a", "c2")
