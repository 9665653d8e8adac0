"""Aliases, rollback, labels, history, replaces and quarantine over a real socket."""

from __future__ import annotations

import asyncio
import base64
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import inference_pb2, server_pb2
from veneer_registry.errors import AdapterBudgetExceeded, DiskFailed, EngineFailed
from veneer_registry.registry import Registry
from veneer_server.engine_client.resident_set import Resident
from veneer_server.wire.messages import AdapterFailed, AdapterSource, WireError

from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    prompt,
    running,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def pushed(front: Front, tmp_path: Path, *seeds: int, name: str = "chat") -> list[str]:
    """Revisions of ``name``, oldest first; the last is current."""
    revisions = []
    for seed in seeds:
        folder = make_adapter(tmp_path / f"{name}-{seed}", seed=seed)
        reply = await front.push(folder, name, allow_replace=True)
        revisions.append(reply.adapter.revision)
    return revisions


async def answered_by(front: Front, adapter: str, **fields: Any) -> str:
    reply = await front.inference.Generate(prompt(adapter=adapter, **fields))
    return str(reply.provenance.revision)


def set_alias(front: Front, alias: str, revision: str = "", **fields: Any) -> Any:
    request = pb.SetAliasRequest(alias=alias, revision=revision, **fields)
    return front.adapters.SetAlias(request)


async def test_an_alias_answers_moves_and_rolls_back(front: Front, tmp_path: Path) -> None:
    old, new = await pushed(front, tmp_path, 1, 2)
    made = await set_alias(front, "chat/prod", old[:12])
    assert made.alias.targets[0].revision == old
    assert not made.previous
    assert await answered_by(front, "chat/prod") == old
    moved = await set_alias(front, "chat/prod", new, etag=made.alias.etag)
    assert [target.revision for target in moved.previous] == [old]
    assert await answered_by(front, "chat/prod") == new
    stale = await failure(set_alias(front, "chat/prod", old, etag=made.alias.etag))
    assert (stale.code, stale.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "ETAG_MISMATCH",
    )
    await set_alias(front, "chat/prod", rollback=True)
    assert await answered_by(front, "chat/prod") == old
    listed = await front.adapters.ListAliases(pb.ListAliasesRequest())
    assert [alias.alias for alias in listed.aliases] == ["chat/prod"]
    shown = (await front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat/prod"))).adapter
    assert (shown.revision, list(shown.aliases)) == (old, ["chat/prod"])
    assert shown.state == pb.ADAPTER_STATE_READY
    await set_alias(front, "chat/prod", remove=True)
    gone = await failure(front.inference.Generate(prompt(adapter="chat/prod")))
    assert gone.reason == "ADAPTER_NOT_FOUND"


async def test_a_canary_is_sticky(front: Front, tmp_path: Path) -> None:
    old, new = await pushed(front, tmp_path, 1, 2)
    targets = [pb.AliasTarget(revision=old, weight=1), pb.AliasTarget(revision=new, weight=1)]
    await set_alias(front, "chat/prod", targets=targets)
    keys = [f"session-{number}" for number in range(40)]
    first = [await answered_by(front, "chat/prod", session_key=key) for key in keys]
    assert first == [await answered_by(front, "chat/prod", session_key=key) for key in keys]
    # 2 in 10^12 that a fair coin falls on one side 40 times.
    assert Counter(first).keys() == {old, new}
    several = await failure(front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat/prod")))
    assert several.metadata["alias"] == "chat/prod"
    too_long = await failure(front.inference.Generate(prompt(session_key="x" * 257)))
    assert too_long.metadata["field"] == "session_key"


async def test_asking_an_alias_for_nothing_or_two_things(front: Front, tmp_path: Path) -> None:
    (revision,) = await pushed(front, tmp_path, 1)
    for fields in (
        {},
        {"revision": revision, "rollback": True},
        {"rollback": True, "remove": True},
    ):
        refused = await failure(set_alias(front, "chat/prod", **fields))
        assert "set one of" in refused.message


async def test_rollback_of_a_name_and_its_history(front: Front, tmp_path: Path) -> None:
    old, new = await pushed(front, tmp_path, 1, 2)
    request = pb.UpdateAdapterRequest(
        name=f"chat@{old}", current=True, labels={"why": "regression"}
    )
    reply = await front.adapters.UpdateAdapter(
        request, metadata=(("veneer-actor", "anna@ops"),)
    )
    assert reply.adapter.current
    assert dict(reply.adapter.labels) == {"why": "regression"}
    assert await answered_by(front, "chat") == old
    entries = []
    token = ""
    while True:
        page = await front.adapters.GetHistory(
            pb.GetHistoryRequest(name="chat", page_size=2, page_token=token)
        )
        entries += page.entries
        token = page.next_page_token
        if not token:
            break
    mine = [entry for entry in entries if entry.actor == "anna@ops"]
    assert [entry.event for entry in mine] == ["made_current", "labels"]
    assert mine[0].revision == old
    assert new in mine[0].detail
    assert mine[0].peer.startswith("ipv4:127.0.0.1")
    assert {"published", "replaced"} <= {entry.event for entry in entries}
    for text in (b"x", b"-1", b"9" * 30):
        token = base64.urlsafe_b64encode(text).decode()
        bad = await failure(front.adapters.GetHistory(pb.GetHistoryRequest(page_token=token)))
        assert (bad.reason, bad.metadata["field"]) == ("INVALID_FIELD", "page_token")


async def test_retention_and_etag_of_an_update(front: Front, tmp_path: Path) -> None:
    await pushed(front, tmp_path, 1, 2, 3)
    reply = await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", retain=0))
    assert reply.adapter.retain == 0
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat"))
    assert len(got.revisions) == 1
    stale = await failure(
        front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", retain=1, etag="1"))
    )
    assert stale.reason == "ETAG_MISMATCH"


async def test_pins_are_in_the_history(front: Front, tmp_path: Path) -> None:
    await pushed(front, tmp_path, 1)
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))
    await front.adapters.EvictAdapter(pb.EvictAdapterRequest(name="chat", unpin=True))
    page = await front.adapters.GetHistory(pb.GetHistoryRequest(name="chat"))
    assert [entry.event for entry in page.entries][:2] == ["unpinned", "pinned"]


# ----------------------------------------------------------------------- replaces


async def test_a_replace_of_what_is_in_memory_is_warm(front: Front, tmp_path: Path) -> None:
    await pushed(front, tmp_path, 1)
    await answered_by(front, "chat")
    await pushed(front, tmp_path, 2)
    reply = await front.inference.Generate(prompt(adapter="chat"))
    assert reply.provenance.tier == inference_pb2.TIER_DEVICE
    cold = await pushed(front, tmp_path, 3, name="cold")
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name=f"cold@{cold[0]}"))
    assert got.adapter.tier == inference_pb2.TIER_DISK, "nobody used what it replaced"


async def test_a_pin_passes_on_to_the_new_revision(front: Front, tmp_path: Path) -> None:
    (old,) = await pushed(front, tmp_path, 1)
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))
    (new,) = await pushed(front, tmp_path, 2)
    for revision, pinned in ((old, False), (new, True)):
        got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name=f"chat@{revision}"))
        assert got.adapter.pinned is pinned


async def test_a_pin_that_another_name_needs_stays(front: Front, tmp_path: Path) -> None:
    (old,) = await pushed(front, tmp_path, 1)
    await front.push(tmp_path / "chat-1", "twin")
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))
    await pushed(front, tmp_path, 2)
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="twin"))
    assert (got.adapter.revision, got.adapter.pinned) == (old, True)


async def test_an_activation_that_fails_publishes_nothing(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = await pushed(front, tmp_path, 1)

    async def full(*args: Any, **options: Any) -> None:
        raise AdapterBudgetExceeded("pins leave no room: evict one")

    monkeypatch.setattr(front.engine, "activate", full)
    folder = make_adapter(tmp_path / "b", seed=2)
    failed = await failure(front.push(folder, "chat", allow_replace=True, activate=True))
    assert failed.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert await answered_by(front, "chat") == old
    # Where it is only a courtesy, the replace stands.
    reply = await front.push(folder, "chat", allow_replace=True)
    assert reply.replaced


async def test_an_etag_guards_a_replace(front: Front, tmp_path: Path) -> None:
    first = await front.push(make_adapter(tmp_path / "a", seed=1), "chat")
    await pushed(front, tmp_path, 2)
    folder = make_adapter(tmp_path / "c", seed=3)
    stale = await failure(
        front.push(folder, "chat", allow_replace=True, etag=first.adapter.etag)
    )
    assert stale.reason == "ETAG_MISMATCH"


@pytest.mark.parametrize("mode", ["FAIL_IF_BUSY", "ABORT", "DRAIN"])
async def test_deleting_what_is_in_use(front: Front, tmp_path: Path, mode: str) -> None:
    (revision,) = await pushed(front, tmp_path, 1)
    front.engine.pace = asyncio.Semaphore(0)
    running = front.inference.Generate(prompt(adapter="chat"))
    await until(lambda: front.engine.in_flight == 1)
    request = pb.DeleteAdapterRequest(name="chat", mode=f"EVICT_MODE_{mode}")
    if mode == "FAIL_IF_BUSY":
        failed = await failure(front.adapters.DeleteAdapter(request))
        assert failed.reason == "ADAPTER_IN_USE"
        assert (await front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat"))).adapter
    else:
        await front.adapters.DeleteAdapter(request)
        told = {"DRAIN": "forget", "ABORT": "abort"}  # nobody can ask for it any more
        assert front.engine.evictions[-1][1] == told[mode]
    for _ in range(4):
        front.engine.pace.release()
    assert (await running).provenance.revision == revision


# --------------------------------------------------------------------- quarantine


async def test_content_that_is_damaged_at_load_is_put_into_quarantine(
    front: Front, tmp_path: Path
) -> None:
    await pushed(front, tmp_path, 1)
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat"))
    error = WireError("ADAPTER_CORRUPT", "a byte differs; push it again", {}, None)
    front.engine.tell(AdapterFailed(got.adapter.weights_digest, error))

    async def state() -> int:
        reply = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="chat"))
        return int(reply.adapter.state)

    while await state() != pb.ADAPTER_STATE_QUARANTINED:  # noqa: ASYNC110 - see `until`
        await asyncio.sleep(0.005)
    refused = await failure(front.inference.Generate(prompt(adapter="chat")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, "ADAPTER_CORRUPT")
    assert "push the same files again" in refused.message
    reply = await front.push(tmp_path / "chat-1", "chat")
    assert not reply.published
    assert reply.adapter.state == pb.ADAPTER_STATE_READY
    assert await answered_by(front, "chat") == got.adapter.revision
    page = await front.adapters.GetHistory(pb.GetHistoryRequest(name="chat"))
    assert [entry.event for entry in page.entries][:2] == ["repaired", "quarantined"]


# ------------------------------------------------------------- budgets, self-test


async def test_budgets_change_while_serving(front: Front) -> None:
    before = (await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())).budgets
    request = pb.UpdateBudgetsRequest(device_adapter_bytes=300 << 20)
    reply = await front.adapters.UpdateBudgets(request)
    assert reply.device_adapter_bytes == 300 << 20
    assert reply.host_cache_bytes == before.host_adapter_bytes
    after = (await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())).budgets
    assert after.device_adapter_bytes == 300 << 20
    assert await front.adapters.UpdateBudgets(pb.UpdateBudgetsRequest()) == reply
    too_much = pb.UpdateBudgetsRequest(host_cache_bytes=1 << 50)
    refused = await failure(front.adapters.UpdateBudgets(too_much))
    assert refused.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert "--host-cache-bytes" in refused.message
    await front.adapters.UpdateBudgets(
        pb.UpdateBudgetsRequest(device_adapter_bytes=before.device_adapter_bytes)
    )


@pytest.mark.push
async def test_pins_and_memory_outlive_the_server(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "server"
    async with running(base_folder, front_cache, data) as front:
        for seed, name in enumerate(("pinned", "used", "deleted")):
            await front.push(make_adapter(tmp_path / name, seed=seed), name)
            await front.adapters.ActivateAdapter(
                pb.ActivateAdapterRequest(name=name, pin=name == "pinned")
            )
        await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="deleted"))
    async with running(base_folder, front_cache, data) as front:
        expected = {r.source.name.split("@")[0]: (r.tier, r.pin) for r in front.engine.expected}
        assert expected == {"pinned": ("device", "device"), "used": ("device", None)}


def pins_on_disk(front: Front) -> set[str]:
    """Weights that a server which is killed now would leave pinned."""
    with closing(sqlite3.connect(front.data_dir / "catalog.sqlite")) as catalog:
        rows = catalog.execute("SELECT weights FROM residents WHERE pin IS NOT NULL")
        return {weights for (weights,) in rows}


async def test_pins_are_written_down_before_anything_is_acknowledged(
    front: Front, tmp_path: Path
) -> None:
    first = await front.push(make_adapter(tmp_path / "a", seed=1), "chat")
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))
    assert pins_on_disk(front) == {first.adapter.weights_digest}
    second = await front.push(make_adapter(tmp_path / "b", seed=2), "chat", allow_replace=True)
    assert pins_on_disk(front) == {second.adapter.weights_digest}, "it passed on"
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="chat"))
    assert pins_on_disk(front) == set()


async def test_a_publish_that_fails_takes_its_pin_back(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await front.push(make_adapter(tmp_path / "a", seed=1), "chat")
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))
    real = front.engine.activate

    async def full(adapter: AdapterSource, *, tier: Any, pin: bool) -> None:
        await real(adapter, tier=tier, pin=pin)
        if not pin:
            raise AdapterBudgetExceeded("no room on the device: evict one")

    monkeypatch.setattr(front.engine, "activate", full)
    monkeypatch.setattr(front.engine, "resident_set", lambda: host_pins(front))
    folder = make_adapter(tmp_path / "b", seed=2)
    failed = await failure(front.push(folder, "chat", allow_replace=True, activate=True))
    assert failed.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert front.engine.pins == [first.adapter.weights_digest]


def host_pins(front: Front) -> tuple[Resident, ...]:
    """The resident set, as if all were pinned to HOST."""
    sources = front.engine.sources
    return tuple(Resident(sources[digest], "host", "host") for digest in front.engine.pins)


async def test_what_stands_is_not_answered_with_an_error_of_what_comes_after(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pushed(front, tmp_path, 1)
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="chat", pinned=True))

    def fail(*args: Any) -> None:
        raise DiskFailed("the disk failed: look at the system's log")

    async def gone(*args: Any) -> None:
        raise EngineFailed("the engine process is restarting: retry")

    folder = make_adapter(tmp_path / "b", seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(front.engine, "unpin", gone)
        reply = await front.push(folder, "chat", allow_replace=True)
    assert reply.replaced
    assert any("pinned" in warning for warning in reply.warnings)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_residents", fail)
        assert (await front.push(make_adapter(tmp_path / "c", seed=3), "other")).published
        await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="chat"))
        # But a pin that would not outlive the server is not acknowledged.
        refused = await failure(
            front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="other", pinned=True))
        )
    assert refused.reason == "DISK_FAILED"
    listed = await front.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [adapter.name for adapter in listed.adapters] == ["other"]


# ------------------------------------------------------------------ callers that leave


async def history(front: Front) -> list[str]:
    page = await front.adapters.GetHistory(pb.GetHistoryRequest(name="chat"))
    return [entry.event for entry in page.entries]


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "warm"])
async def test_a_replace_whose_caller_leaves_while_it_is_warmed_leaves_nothing(
    front: Front, tmp_path: Path, pinned: bool
) -> None:
    (old,) = await pushed(front, tmp_path, 1)
    await front.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="chat", pin=pinned))
    before, written = dict(front.engine.residency), await history(front)
    front.engine.activating = asyncio.Event()
    front.engine.activations.clear()
    call = front.push(make_adapter(tmp_path / "b", seed=2), "chat", allow_replace=True)
    task = asyncio.ensure_future(call)
    await until(lambda: bool(front.engine.activations))
    (digest,) = front.engine.activations
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: (digest, "forget") in front.engine.evictions)
    front.engine.activating.set()
    weights = front.data_dir / "store" / "weights" / digest
    await until(lambda: not weights.exists())
    assert front.engine.residency == before
    assert pins_on_disk(front) == set(front.engine.pins)
    assert await answered_by(front, "chat") == old
    assert await history(front) == written
    # The same upload again succeeds.
    front.engine.activating = None
    reply = await front.push(tmp_path / "b", "chat", allow_replace=True)
    assert reply.replaced
    assert reply.adapter.pinned == pinned


async def test_an_activation_whose_caller_leaves_is_carried_out_whole(
    front: Front, tmp_path: Path
) -> None:
    await pushed(front, tmp_path, 1)
    front.engine.activating, written = asyncio.Event(), await history(front)
    call = front.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="chat", pin=True))
    await until(lambda: bool(front.engine.activations))
    call.cancel()
    front.engine.activating.set()
    while (now := await history(front)) == written:  # noqa: ASYNC110 - see `until`
        await asyncio.sleep(0.005)
    assert now == ["pinned", *written]
    await until(lambda: pins_on_disk(front) == set(front.engine.pins) != set())
