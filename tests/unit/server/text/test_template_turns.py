"""Which caller's chat a template process renders next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from veneer_registry.errors import QueueFull
from veneer_server.queues.fairness import Sender
from veneer_server.text import turns as template_turns
from veneer_server.text.turns import CREDIT_S, NEW_S, Accounts, Key, Turns

SLOW_S = 0.17
QUICK_S = 0.001


def key_of(template: str, caller: str | Sender) -> Key:
    """Args: caller: a connection of a server without keys, or any sender."""
    if isinstance(caller, str):
        caller = Sender("default", "127.0.0.1", "", caller)
    return caller, template.encode()


class Desk:
    """A process that is simulated: each rendering takes time of a clock that stands still
    otherwise, and the order of renderings is noted."""

    def __init__(self) -> None:
        self.now = 0.0
        self.accounts = Accounts(lambda: self.now)
        self.turns = Turns(self.accounts)
        self.order: list[str] = []

    async def chat(self, template: str, caller: str | Sender, seconds: float) -> None:
        key = key_of(template, caller)
        async with self.turns.turn(key):
            self.now += seconds
            self.order.append(template)
            self.accounts.charge(key, seconds, quick=seconds < 0.02)
            await asyncio.sleep(0)

    async def all(self, *chats: Awaitable[None]) -> list[str]:
        """The order in which chats that come together are rendered."""
        self.order.clear()
        await asyncio.gather(*chats)
        return self.order


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_an_innocent_chat_waits_for_one_slow_rendering(desk: Desk) -> None:
    """Sixteen slow templates, each with a caller of its own, delayed it by 3 s."""
    await desk.chat("innocent", "me", QUICK_S)
    for round_ in range(3):
        slow = [desk.chat(f"slow {n}", f"caller {n}", SLOW_S) for n in range(16)]
        order = await desk.all(*slow, desk.chat("innocent", "me", QUICK_S))
        assert order.index("innocent") == 1, round_


async def test_a_new_template_is_not_behind_those_known_to_be_slow(desk: Desk) -> None:
    def slow() -> list[Awaitable[None]]:
        return [desk.chat(f"slow {n}", f"caller {n}", SLOW_S) for n in range(16)]

    await desk.all(*slow())
    order = await desk.all(*slow(), desk.chat("new", "me", QUICK_S))
    assert order.index("new") == 1


async def test_a_caller_with_many_new_templates_waits_for_itself(desk: Desk) -> None:
    await desk.chat("earlier", "attacker", SLOW_S + NEW_S)
    slow = [desk.chat(f"slow {n}", "attacker", SLOW_S) for n in range(16)]
    order = await desk.all(*slow, desk.chat("new", "me", QUICK_S))
    assert order.index("new") == 1


async def test_behind_one_connection_templates_are_told_apart(desk: Desk) -> None:
    """A gateway's connection carries the calls of many."""
    await desk.chat("innocent", "gateway", QUICK_S)
    await desk.chat("slow", "gateway", 2.0)
    slow = [desk.chat(f"slow {n}", "gateway", SLOW_S) for n in range(16)]
    order = await desk.all(*slow, desk.chat("innocent", "gateway", QUICK_S))
    assert order.index("innocent") == 1


async def test_many_quick_chats_do_not_keep_a_new_template_waiting(desk: Desk) -> None:
    flood = [desk.chat(f"flood {n % 8}", f"caller {n % 8}", 0.015) for n in range(480)]
    order = await desk.all(*flood, desk.chat("new", "me", QUICK_S))
    assert order.index("new") < 200


async def test_what_was_used_is_forgiven_in_time(desk: Desk) -> None:
    await desk.chat("once", "me", 2.0)
    await desk.chat("once", "me", QUICK_S)
    before = desk.accounts.ranks()(key_of("once", "me"))
    desk.now += 60
    assert max(desk.accounts.ranks()(key_of("once", "me"))) < 0.1 < min(before)


async def test_many_connections_have_the_turns_of_their_tenant(desk: Desk) -> None:
    """150 of them, with a template each, delayed another tenant's chats by as many turns."""
    bad = [Sender("bad", f"key {n % 4}", "", f"connection {n}") for n in range(150)]
    good = Sender("good", "key", "", "connection")
    for round_ in range(3):
        slow = [desk.chat(f"slow {round_} {n}", each, SLOW_S) for n, each in enumerate(bad)]
        quick = [desk.chat(f"good {n}", good, 0.005) for n in range(3)]
        order = await desk.all(*slow, *quick)
        assert max(order.index(f"good {n}") for n in range(3)) < 10, round_


async def test_inside_a_tenant_keys_have_turns_and_inside_a_gateway_users(desk: Desk) -> None:
    for bad, good in (
        (Sender("t", "bad", "", "c"), Sender("t", "good", "", "c")),
        (Sender("t", "gateway", "bad", "c"), Sender("t", "gateway", "good", "c")),
    ):
        slow = [
            desk.chat(f"slow {n}", bad._replace(connection=f"c{n}"), SLOW_S) for n in range(50)
        ]
        order = await desk.all(*slow, desk.chat("mine", good, QUICK_S))
        assert order.index("mine") < 4


async def test_what_others_do_with_a_template_costs_nobody_else(desk: Desk) -> None:
    """The template is public; only whose chats are slow is behind."""
    bad, good = Sender("bad", "key", "", "c"), Sender("good", "key", "", "c")
    await desk.chat("public", good, QUICK_S)
    before = desk.accounts.ranks()(key_of("public", good))
    await desk.chat("public", bad, 2.0)
    assert desk.accounts.ranks()(key_of("public", good)) == pytest.approx(before, abs=0.001)


async def test_one_who_was_idle_is_not_first_for_long(desk: Desk) -> None:
    """Else a busy tenant would wait until another has used as much as itself."""
    busy, idle = Sender("busy", "key", "", "c"), Sender("idle", "key", "", "c")
    for _ in range(1000):
        await desk.chat("busy", busy, 0.01)
    await desk.chat("idle", idle, 0.015)
    desk.now += 1
    chats = [desk.chat("busy", busy, 0.01) for _ in range(60)]
    chats += [desk.chat("idle", idle, 0.015) for _ in range(60)]
    order = await desk.all(*chats)
    assert order[1 : 2 + int(CREDIT_S / 0.015) + 4].count("busy") > 0
    assert 30 < order[:100].count("busy") < 61


async def test_many_of_one_template_are_refused_to_the_connection_that_sends_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_turns, "MAX_WAITING", 2)
    chats = [desk.chat("same", "many", QUICK_S) for _ in range(4)]
    ends = await asyncio.gather(
        *chats,
        desk.chat("same", "one", QUICK_S),
        desk.chat("other", "many", QUICK_S),
        return_exceptions=True,
    )
    assert [type(end) for end in ends if end is not None] == [QueueFull]
    assert desk.order.count("same") == 4
    assert desk.order.count("other") == 1


async def test_many_callers_who_leave_together_are_forgotten_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was ranked among all the others: with a thousand, the event loop stood for 2 s."""
    ranked = 0
    ranks = desk.accounts.ranks

    def counted() -> Callable[[Key], tuple[float, ...]]:
        rank = ranks()

        def count(key: Key) -> tuple[float, ...]:
            nonlocal ranked
            ranked += 1
            return rank(key)

        return count

    monkeypatch.setattr(desk.accounts, "ranks", counted)
    held = asyncio.Event()

    async def hold() -> None:
        async with desk.turns.turn(key_of("first", "first")):
            await held.wait()

    async with asyncio.TaskGroup() as group:
        first = group.create_task(hold())
        await asyncio.sleep(0)
        chats = [desk.chat("same", f"caller {n}", QUICK_S) for n in range(100)]
        leavers = [group.create_task(chat) for chat in chats]
        await asyncio.sleep(0)
        stays = group.create_task(desk.chat("stays", "me", QUICK_S))
        await asyncio.sleep(0)
        for each in (first, *leavers):  # in this order, as a connection that many share ends
            each.cancel()
        await stays
    assert desk.order == ["stays"]
    assert ranked < 300


@pytest.mark.parametrize("when", ["while it waits", "when its turn has come"])
async def test_a_caller_who_leaves_passes_the_turn_on(desk: Desk, when: str) -> None:
    held = asyncio.Event()
    leaver: asyncio.Task[None]

    async def hold(leave: Callable[[], object]) -> None:
        async with desk.turns.turn(key_of("first", "first")):
            await held.wait()
        leave()

    first = asyncio.create_task(
        hold(lambda: leaver.cancel() if when == "when its turn has come" else None)
    )
    await asyncio.sleep(0)
    leaver = asyncio.create_task(desk.chat("leaves", "a", QUICK_S))
    await asyncio.sleep(0)
    last = asyncio.create_task(desk.chat("last", "b", QUICK_S))
    await asyncio.sleep(0)
    if when == "while it waits":
        leaver.cancel()
        await asyncio.sleep(0)
    held.set()
    await first
    await last
    assert leaver.cancelled()
    assert desk.order == ["last"]
