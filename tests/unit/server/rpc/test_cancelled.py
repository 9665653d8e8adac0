"""What a caller leaves behind that cancels an admin call, at every point where the call waits.

Each case sets up a server, cancels the call at its k-th wait, for k = 0, 1, ... until it
ends before that, and checks engine, front, catalog and disk (`Server.check`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.unit.registry.kit import make_adapter
from tests.unit.server.rpc.cancelling import BUDGET, Cancelled, Server, server

Folders = Callable[[int], Path]
Call = Callable[[Server], Coroutine[Any, Any, Any]]

HOW = [
    pytest.param({}, id="at once"),
    pytest.param({"later": 1}, id="a turn later"),
    pytest.param({"later": 3}, id="three turns later"),
    pytest.param({"later": 7}, id="seven turns later"),
    pytest.param({"again": True}, id="again and again"),
]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    def make(seed: int) -> Path:
        folder = tmp_path / f"adapter-{seed}"
        return folder if folder.exists() else make_adapter(folder, seed=seed)

    return make


class Everywhere:
    """Cancels a call at each of its waits, each time on a server of its own."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
        self._tmp_path = tmp_path
        self._monkeypatch = monkeypatch
        self._how = how

    async def cancel(
        self,
        call: Call,
        *,
        before: Callable[[Server], Awaitable[None]],
        after: Callable[[Server, bool], Awaitable[None]],
    ) -> int:
        """``after`` is told whether the call ended well. Returns how many waits there were."""
        wait = 0
        while True:
            async with server(self._tmp_path / f"server-{wait}", self._monkeypatch) as made:
                await before(made)
                cancelled = Cancelled(call(made), wait, **self._how)

                async def run(cancelled: Cancelled = cancelled) -> None:
                    await cancelled

                task = asyncio.create_task(run())
                await asyncio.wait({task})
                ended = not task.cancelled()
                if ended:
                    task.result()
                await made.end_requests()
                try:
                    await made.check()
                    await after(made, ended)
                except AssertionError as error:
                    error.add_note(f"cancelled at wait {wait}, {self._how}")
                    raise
            if not cancelled.reached:
                assert ended
                return wait
            wait += 1


@pytest.fixture(params=HOW)
def everywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Everywhere:
    return Everywhere(tmp_path, monkeypatch, request.param)


async def nothing(made: Server) -> None:
    pass


async def test_an_upload(everywhere: Everywhere, folders: Folders) -> None:
    async def after(made: Server, ended: bool) -> None:
        stands = made.means("chat") is not None
        assert stands or not ended
        assert made.history("chat") == ["published"] * stands
        assert made.happened() == ["published"] * stands

    waits = await everywhere.cancel(
        lambda made: made.push(folders(1), "chat"), before=nothing, after=after
    )
    assert waits > 3


async def test_an_upload_that_is_only_checked(everywhere: Everywhere, folders: Folders) -> None:
    async def after(made: Server, ended: bool) -> None:
        assert made.means("chat") is None
        assert made.history("chat") == made.happened() == []
        assert not list(made.store.iterdir())

    waits = await everywhere.cancel(
        lambda made: made.push(folders(1), "chat", validate_only=True),
        before=nothing,
        after=after,
    )
    assert waits > 3


async def test_an_upload_that_activates(everywhere: Everywhere, folders: Folders) -> None:
    async def after(made: Server, ended: bool) -> None:
        digest = made.means("chat")
        assert digest is not None or not ended
        assert list(made.in_memory()) == ([] if digest is None else [digest])
        assert ("published" in made.happened()) == (digest is not None)
        assert made.history("chat") == ["published"] * (digest is not None)

    waits = await everywhere.cancel(
        lambda made: made.push(folders(1), "chat", activate=True), before=nothing, after=after
    )
    assert waits > 4


@pytest.mark.parametrize("activate", [False, True], ids=["warm", "activate"])
@pytest.mark.parametrize("retain", [0, 2], ids=["drops the old", "keeps the old"])
async def test_a_replace_of_what_is_pinned(
    everywhere: Everywhere, folders: Folders, activate: bool, retain: int
) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")
        await made.call("UpdateAdapter", name="chat", pinned=True)
        await made.call("UpdateAdapter", name="chat", retain=retain)

    async def after(made: Server, ended: bool) -> None:
        (old,) = {r.ref.weights_digest for r in made.registry.revisions("chat")[-1:]}
        digest = made.means("chat")
        replaced = "replaced" in made.history("chat")
        assert replaced or not ended
        assert ("replaced" in made.happened()) == replaced
        pins = {digest for digest, pinned in made.in_memory().items() if pinned}
        assert pins == {digest}, "the pin is on what the name means"
        if not replaced:
            assert digest == old

    waits = await everywhere.cancel(
        lambda made: made.push(folders(2), "chat", allow_replace=True, activate=activate),
        before=before,
        after=after,
    )
    assert waits > 5


@pytest.mark.push
async def test_a_replace_by_what_another_name_has(
    everywhere: Everywhere, folders: Folders
) -> None:
    """Its copy and its pin are that name's."""

    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")
        await made.push(folders(2), "twin")
        await made.call("ActivateAdapter", name="chat", pin=True)
        await made.call("ActivateAdapter", name="twin", pin=True)

    async def after(made: Server, ended: bool) -> None:
        assert made.in_memory()[made.means("twin") or ""], "another name's pin is gone"
        assert made.in_memory()[made.means("chat") or ""]
        assert ("replaced" in made.history("chat")) or not ended

    await everywhere.cancel(
        lambda made: made.push(folders(2), "chat", allow_replace=True),
        before=before,
        after=after,
    )


@pytest.mark.parametrize("pin", [False, True], ids=["", "pinned"])
async def test_an_activation(everywhere: Everywhere, folders: Folders, pin: bool) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")

    async def after(made: Server, ended: bool) -> None:
        pinned = made.in_memory().get(made.means("chat") or "", False)
        assert made.history("chat") == ["published", *(["pinned"] if pinned else [])]
        assert pinned == pin or not ended

    await everywhere.cancel(
        lambda made: made.call("ActivateAdapter", name="chat", pin=pin),
        before=before,
        after=after,
    )


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_an_eviction(everywhere: Everywhere, folders: Folders, busy: bool) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")
        await made.call("ActivateAdapter", name="chat", pin=True)
        if busy:
            await made.request("chat")

    async def after(made: Server, ended: bool) -> None:
        digest = made.means("chat") or ""
        pinned = made.in_memory().get(digest, False)
        unpinned = [] if pinned else ["unpinned"]
        assert made.history("chat") == ["published", "pinned", *unpinned]
        assert not pinned or not ended
        assert pinned == (digest in made.in_memory())

    await everywhere.cancel(
        lambda made: made.call("EvictAdapter", name="chat", unpin=True),
        before=before,
        after=after,
    )


@pytest.mark.parametrize("pinned", [False, True], ids=["unpin", "pin"])
async def test_an_update(everywhere: Everywhere, folders: Folders, pinned: bool) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")
        if not pinned:
            await made.call("ActivateAdapter", name="chat", pin=True)

    async def after(made: Server, ended: bool) -> None:
        now = made.in_memory().get(made.means("chat") or "", False)
        events = made.history("chat")
        first = [] if pinned else ["pinned"]
        done = "labels" in events
        assert done or not ended
        changed = ["labels", "pinned" if pinned else "unpinned"] if done else []
        assert events == ["published", *first, *changed], "half of what was asked for"
        assert now == (pinned if done else not pinned and bool(first))

    await everywhere.cancel(
        lambda made: made.call(
            "UpdateAdapter", name="chat", labels={"team": "a"}, pinned=pinned
        ),
        before=before,
        after=after,
    )


async def test_a_deletion(everywhere: Everywhere, folders: Folders) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")
        await made.call("ActivateAdapter", name="chat", pin=True)

    async def after(made: Server, ended: bool) -> None:
        gone = made.means("chat") is None
        assert gone or not ended
        assert bool(made.in_memory()) != gone
        assert ("deleted" in made.happened()) == gone

    await everywhere.cancel(
        lambda made: made.call("DeleteAdapter", name="chat"), before=before, after=after
    )


async def test_a_move_of_an_alias(everywhere: Everywhere, folders: Folders) -> None:
    async def before(made: Server) -> None:
        await made.push(folders(1), "chat")

    async def after(made: Server, ended: bool) -> None:
        there = bool(made.registry.aliases("chat"))
        assert there or not ended
        assert ("alias_set" in made.history("chat")) == there
        assert ("alias_changed" in made.happened()) == there

    async def move(made: Server) -> None:
        revision = made.registry.resolve("chat").revision[:12]
        await made.call("SetAlias", alias="chat/prod", revision=revision)

    await everywhere.cancel(move, before=before, after=after)


async def test_a_change_of_budgets(everywhere: Everywhere, folders: Folders) -> None:
    """Front, engine, metrics and the engine that is started next agree on them."""
    lower = BUDGET // 2

    async def before(made: Server) -> None:
        await made.push(folders(1), "chat", activate=True)

    async def after(made: Server, ended: bool) -> None:
        budgets, residency = made.budgets, made.residency
        assert budgets.device in ((lower,) if ended else (lower, BUDGET))
        tiers = residency.budget("host"), residency.budget("device")
        assert tiers == (budgets.host, budgets.device)
        assert (budgets.host, budgets.memory) == (BUDGET, (BUDGET, budgets.device))
        name = "veneer_adapter_budget_bytes"
        shown = made.metrics.registry.get_sample_value(name, {"tier": "device"})
        assert shown == budgets.device
        # private: the next start's settings; a start takes a second, at each of 100 waits
        assert made.engine._supervisor.config.device_adapter_bytes == budgets.device

    await everywhere.cancel(
        lambda made: made.call("UpdateBudgets", device_adapter_bytes=lower),
        before=before,
        after=after,
    )
